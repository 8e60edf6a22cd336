"""Two graphs of different precision under the same choice of experts.

In low precision two experts of nearly the same score may change places. One token that goes elsewhere moves the output
far beyond any tolerance, and every token after it with it, though nothing is wrong. So the question is split in two:

    is each choice that differs one between experts whose scores are within the tolerance?   (counted as flips)
    is the output the same when both graphs take the same experts?

`with_forced_choices` makes the graph that takes the choices of another as inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

FORCED, CHOICE, SCORES = "moe_export.forced.{}", "moe_export.choice.{}", "moe_export.scores.{}"


@dataclass(frozen=True)
class Choices:
    """The names of `count` choices: in the graph that makes them, and in the one that is told."""

    count: int

    @property
    def forced(self) -> tuple[str, ...]:
        """Inputs of the graph that is told."""
        return tuple(FORCED.format(index) for index in range(self.count))

    @property
    def made(self) -> tuple[str, ...]:
        """Outputs of both: what each would choose by itself."""
        return tuple(CHOICE.format(index) for index in range(self.count))

    @property
    def scores(self) -> tuple[str, ...]:
        """Outputs of the graph that is told: what the choice is made by."""
        return tuple(SCORES.format(index) for index in range(self.count))


def find_choices(model: ir.Model) -> tuple[ir.Node, ...]:
    """The nodes that choose the largest of the last axis: `TopK`s whose positions are used."""
    return tuple(
        node
        for node in model.graph
        if node.op_type == "TopK"
        and node.attributes.get_int("largest", 1) == 1
        and _is_last(node)
        and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    )


def _is_last(node: ir.Node) -> bool:
    axis, shape = (
        node.attributes.get_int("axis", -1),
        node.inputs[0].shape if node.inputs[0] is not None else None,
    )
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def with_choices_out(model: ir.Model) -> ir.Model:
    """A copy of a graph that also returns its choices."""
    copy = model.clone()
    for index, node in enumerate(find_choices(copy)):
        _return(copy, node.outputs[1], CHOICE.format(index))
    return copy


def with_forced_choices(model: ir.Model) -> ir.Model:
    """A copy of a graph whose choices are inputs; it returns what it would have chosen, and by which scores."""
    copy = model.clone()
    for index, node in enumerate(find_choices(copy)):
        scores, positions = node.inputs[0], node.outputs[1]
        assert scores is not None
        given = ir.Value(
            name=FORCED.format(index), shape=positions.shape, type=ir.TensorType(ir.DataType.INT64)
        )
        copy.graph.inputs.append(given)
        picked = ir.node("GatherElements", [scores, given], {"axis": -1}, name=f"{node.name}.picked")
        kept = ir.node("Identity", [given], name=f"{node.name}.given")
        for made, old in ((picked, node.outputs[0]), (kept, positions)):
            value = made.outputs[0]
            value.name, value.type, value.shape = old.name, old.type, old.shape
            old.name = f"{old.name}.own"
            old.replace_all_uses_with(value, replace_graph_outputs=True)
            node.append(made)
        _return(copy, positions, CHOICE.format(index))
        _return(copy, scores, SCORES.format(index))
    return copy


def _return(model: ir.Model, value: ir.Value, name: str) -> None:
    node = ir.node("Identity", [value], name=f"return_{name}")
    node.outputs[0].name = name
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
