"""`results_inwards`: what only sums up each step's result is moved into the step.

    before   ys = loop(… h(t) …) (b, l, d, n)   y = ys @ C[…, None]          b * l * d * n values are written and read
    after    y = loop(… h(t) @ C(t)[:, None] …) (b, l, d, 1)                 b * l * d values are written

The nodes after a result are followed as long as each value between them has one reader, and the loop takes in those up
to the smallest value. It is the mirror image of `scans/inputs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from moe_export.errors import RefusedError
from moe_export.export.onnx.bodies import reads
from moe_export.export.scans.batched import (
    POINTWISE,
    REDUCTIONS,
    amount_of,
    axes_of,
    number_of,
    rank_of,
)
from moe_export.export.scans.loop_region import LoopRegion, new_element, read_region, with_elements
from moe_export.export.scans.order import written_last
from moe_export.export.sizes import same_dim
from moe_export.graph_builder import GraphBuilder

_MOST_NODES = 8  # followed after a result: a product, its sum and the views around them are fewer


@dataclass(frozen=True)
class _Behind:
    """A node that follows a result.

    Attributes:
        node: The node.
        value: The operand that comes from the loop.
        axis: The axis of time in the node's output.
        places: The axis of time in each operand; None for one without it, or with size 1 there.
    """

    node: ir.Node
    value: ir.Value
    axis: int
    places: tuple[int | None, ...]

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]


def results_inwards(graph: ir.Graph, end: ir.Node) -> None:
    """Move nodes that sum up a loop region's results into its steps, in place."""
    loop = read_region(graph, end)
    for number in range(len(loop.collected)):
        chain = _chain(graph, loop, number)
        if chain:
            written_last(graph, end)  # so that what the chain reads comes before the loop
            _take_in(graph, loop, number, chain)
            loop = read_region(graph, end)


def _chain(graph: ir.Graph, loop: LoopRegion, number: int) -> list[_Behind]:
    """The nodes to take in; empty where nothing is gained."""
    value, axis = loop.end.outputs[len(loop.states) + number], loop.axes[number]
    late = _made_after(graph, loop.end)
    least, best, found = amount_of(value, axis), 0, list[_Behind]()
    while len(found) < _MOST_NODES:
        uses = tuple(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            break
        node = uses[0].node
        try:
            behind = _behind(node, value, axis)
        except RefusedError:
            break
        others = (each for each in node.inputs if each is not None and each is not value)
        if node.graph is not graph or any(each in late for each in others):
            break
        found.append(behind)
        value, axis = behind.output, behind.axis
        left = amount_of(value, axis)
        if left < least or (
            found[best:] == [behind] and best and left == least and node.op_type == "Squeeze"
        ):
            least, best = left, len(found)
    return found[:best]


def _made_after(graph: ir.Graph, end: ir.Node) -> set[ir.Value]:
    """The values that depend on the loop."""
    found = set(end.outputs)
    for node in graph:
        if not found.isdisjoint(reads(node)):
            found.update(node.outputs)
    return found


def _behind(node: ir.Node, value: ir.Value, axis: int) -> _Behind:
    """A node as part of a step.

    Raises:
        RefusedError: It mixes steps, or no rule says how it treats them.
    """
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1 or node.outputs[0].shape is None:
        raise RefusedError(f"{node.op_type} after a loop")
    if node.op_type in REDUCTIONS or node.op_type == "Squeeze":
        rank = rank_of(value)
        axes = {each % rank for each in axes_of(node.inputs[1] if len(node.inputs) > 1 else None)}
        if axis in axes or node.inputs[0] is not value:
            raise RefusedError("steps are summed up")
        kept = node.op_type != "Squeeze" and number_of(node, "keepdims", 1)
        after = axis if kept else axis - sum(each < axis for each in axes)
        return _Behind(node, value, after, (axis, None))
    if node.op_type == "Transpose":
        return _Behind(node, value, _order(node, value).index(axis), (axis,))
    if node.op_type != "MatMul" and node.op_type not in POINTWISE:
        raise RefusedError(f"{node.op_type} after a loop")
    rank = rank_of(node.outputs[0])
    after = axis + rank - rank_of(value)
    if node.op_type == "MatMul" and after >= rank - 2:
        raise RefusedError("steps are summed up")
    if node.op_type == "MatMul" and any(rank_of(each) < 2 for each in node.inputs if each is not None):
        raise RefusedError("a product with a vector")
    places = tuple(_place(each, after - rank, value, axis) for each in node.inputs)
    return _Behind(node, value, after, places)


def _order(node: ir.Node, value: ir.Value) -> list[int]:
    if "perm" in node.attributes:
        return [int(axis) for axis in node.attributes["perm"].as_ints()]
    return list(reversed(range(rank_of(value))))


def _place(operand: ir.Value | None, from_end: int, value: ir.Value, axis: int) -> int | None:
    """The axis of time in an operand that is broadcast with the value; None if it has none, or size 1 there."""
    if operand is None or rank_of(operand) + from_end < 0:
        return None
    place = rank_of(operand) + from_end
    assert operand.shape is not None
    assert value.shape is not None
    if operand.shape[place] == 1:
        return None
    if not same_dim(operand.shape[place], value.shape[axis]):
        raise RefusedError("it is unknown whether an operand has an element for each step")
    return place


def _take_in(graph: ir.Graph, loop: LoopRegion, number: int, chain: Sequence[_Behind]) -> None:
    end, nodes = loop.end, GraphBuilder.in_front_of(loop.end, f"result_{loop.number}_{number}")
    boundaries: list[ir.Node] = []
    value = loop.collected[number]
    for behind in chain:
        if behind.node.op_type == "Transpose":
            (time,) = behind.places
            order = [each for each in _order(behind.node, behind.value) if each != time]
            value = nodes.transposed(value, [each - (each > (time or 0)) for each in order])
        else:
            inputs = [
                value
                if each is behind.value
                else _operand(graph, nodes, loop, number, behind, each, place, boundaries)
                for each, place in zip(behind.node.inputs, behind.places, strict=False)
            ]
            (value,) = nodes.copy(behind.node, inputs)
        sizes = list(behind.output.shape or ())
        value.shape = ir.Shape([*sizes[: behind.axis], *sizes[behind.axis + 1 :]])
        value.type = behind.output.type
    states = len(loop.states)
    with_elements(end, [boundary.outputs[0] for boundary in (*loop.elements, *boundaries)])
    end.replace_input_with(2 * states + len(loop.elements) + len(boundaries) + number, value)
    axes = list(end.attributes["axes"].as_ints())
    axes[number] = chain[-1].axis
    end.attributes["axes"] = ir.AttrInt64s("axes", axes)
    result, last = end.outputs[states + number], chain[-1].output
    result.shape, result.type = last.shape, last.type
    last.replace_all_uses_with(result, replace_graph_outputs=True)
    for behind in reversed(chain):
        graph.remove(behind.node, safe=True)


def _operand(
    graph: ir.Graph,
    nodes: GraphBuilder,
    loop: LoopRegion,
    number: int,
    behind: _Behind,
    value: ir.Value | None,
    place: int | None,
    boundaries: list[ir.Node],
) -> ir.Value | None:
    """An operand as the step sees it: an element of it if it has time, else itself without the axis of size 1."""
    if value is None:
        return None
    if behind.node.op_type in REDUCTIONS or behind.node.op_type == "Squeeze":  # the axes
        time = behind.places[0]
        assert time is not None
        axes = [each % rank_of(behind.value) for each in axes_of(value)]
        return nodes.ints(*(each - (each > time) for each in axes))
    if place is not None:
        boundary = new_element(
            graph, loop.end, value, place, loop=loop.number,
            place=len(loop.elements) + len(boundaries), backwards=int(loop.backwards[number]),
        )  # fmt: skip
        boundaries.append(boundary)
        return boundary.outputs[0]
    at = rank_of(value) + behind.axis - rank_of(behind.output)
    return value if at < 0 else nodes.op("Squeeze", value, nodes.ints(at))
