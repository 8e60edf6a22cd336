"""`LoopRegion`: a loop between its boundary nodes in a translated graph, as plain data.

h = State(h0)   x = Element(xs)   …body…   last, ys = End(h, x, h', y)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from moe_export.export.onnx.bodies import reads
from moe_export.export.tracing.traced_loops import DOMAIN, ELEMENT, STATE


@dataclass(frozen=True)
class LoopRegion:
    """A loop region.

    Attributes:
        end: The node that closes it; its outputs are the last states, then what was collected.
        states: Boundary nodes of the states.
        elements: Boundary nodes of the sequences, one element of which a step reads.
        body: The nodes that depend on a boundary node and that the end depends on, in graph order.
        following: The next states.
        collected: What each step returns besides the states.
        axes: For each collected value, where its axis of time goes.
        backwards: For each collected value, whether the last step comes first.
    """

    end: ir.Node
    states: tuple[ir.Node, ...]
    elements: tuple[ir.Node, ...]
    body: tuple[ir.Node, ...]
    following: tuple[ir.Value, ...]
    collected: tuple[ir.Value, ...]
    axes: tuple[int, ...]
    backwards: tuple[bool, ...]

    @property
    def number(self) -> int:
        """A number that no other loop of the model has."""
        return integer(self.end, "loop")

    def dependent(self) -> set[ir.Value]:
        """The values that depend on a state."""
        return _dependent([boundary.outputs[0] for boundary in self.states], self.body)


def integer(node: ir.Node, name: str) -> int:
    """An integer attribute of a boundary node."""
    return int(node.attributes[name].as_int())


def read_region(graph: ir.Graph, end: ir.Node) -> LoopRegion:
    """Read a loop region off the graph, given its end node."""
    states, elements = integer(end, "states"), integer(end, "elements")
    boundaries = [_boundary(value) for value in end.inputs[: states + elements]]
    results = [value for value in end.inputs[states + elements :] if value is not None]
    count = len(results) - states
    return LoopRegion(
        end,
        tuple(boundaries[:states]),
        tuple(boundaries[states:]),
        tuple(_between(graph, boundaries, end)),
        tuple(results[:states]),
        tuple(results[states:]),
        tuple(int(axis) for axis in end.attributes["axes"].as_ints())[:count],
        tuple(bool(flag) for flag in end.attributes["backwards"].as_ints())[:count],
    )


def new_element(
    graph: ir.Graph, before: ir.Node, value: ir.Value, axis: int, *, loop: int, place: int, backwards: int
) -> ir.Node:
    """Write the boundary node of a sequence, one element of which a step reads.

    Args:
        graph: The graph that it is written into.
        before: The node that it is written in front of.
        value: The sequence.
        axis: The axis of time in it.
        loop: The loop's number.
        place: The element's number in the loop.
        backwards: 1 if the last element is read first.
    """
    numbers = {"loop": loop, "place": place, "axis": axis, "backwards": backwards}
    boundary = ir.node(ELEMENT, [value], attributes=numbers, domain=DOMAIN)
    element = boundary.outputs[0]
    element.shape = ir.Shape([size for at, size in enumerate(value.shape or ()) if at != axis])
    element.type, element.name = value.type, f"{value.name}_element_{loop}_{axis}"
    graph.insert_before(before, boundary)
    return boundary


def with_elements(end: ir.Node, elements: Sequence[ir.Value]) -> None:
    """Replace the elements among a loop end's inputs; its states and results stay."""
    states, count = integer(end, "states"), integer(end, "elements")
    inputs = [*end.inputs[:states], *elements, *end.inputs[states + count :]]
    end.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        end.replace_input_with(place, value)
    end.attributes["elements"] = ir.AttrInt64("elements", len(elements))


def _boundary(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None
    assert node.domain == DOMAIN
    assert node.op_type in (STATE, ELEMENT)
    return node


def _between(graph: ir.Graph, boundaries: Sequence[ir.Node], end: ir.Node) -> list[ir.Node]:
    """The nodes that depend on a boundary node and that the end depends on, in graph order."""
    needed: set[ir.Node] = set()
    stack = [value.producer() for value in end.inputs if value is not None]
    while stack:
        node = stack.pop()
        if node is not None and node not in needed and node not in boundaries:
            needed.add(node)
            stack += [value.producer() for value in reads(node)]
    dependent = _dependent(
        [boundary.outputs[0] for boundary in boundaries], (node for node in graph if node in needed)
    )
    return [node for node in graph if node in needed and node.outputs[0] in dependent]


def _dependent(values: Iterable[ir.Value], nodes: Iterable[ir.Node]) -> set[ir.Value]:
    found = set(values)
    for node in nodes:
        if any(value in found for value in reads(node)):
            found.update(node.outputs)
    return found
