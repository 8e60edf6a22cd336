"""Routing replay: compare two graphs of different precision under the same choice of experts.

In low precision, two experts with nearly equal scores may change places. A single token routed differently moves the
output, and that of every later token, far beyond any tolerance, although nothing is wrong. So the comparison asks two
questions:

    do the choices differ only between experts whose scores are within the tolerance?   (counted as flips)
    are the outputs equal when both graphs use the same experts?

`with_forced_choices` builds a graph that takes another graph's choices as inputs. Whatever axis a `TopK` works along,
that axis is the last one of these inputs and of the choices and scores that the graph returns.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

FORCED, CHOICE, SCORES = "moe_export.forced.{}", "moe_export.choice.{}", "moe_export.scores.{}"


@dataclass(frozen=True)
class Choices:
    """The names of `count` choices, in the graph that makes them and in the graph that replays them."""

    count: int

    @property
    def forced(self) -> tuple[str, ...]:
        """Inputs of the replaying graph: the choices that it uses."""
        return tuple(FORCED.format(index) for index in range(self.count))

    @property
    def made(self) -> tuple[str, ...]:
        """Outputs of both graphs: the choices that each makes itself."""
        return tuple(CHOICE.format(index) for index in range(self.count))

    @property
    def scores(self) -> tuple[str, ...]:
        """Outputs of the replaying graph, or of one that was asked for them: the scores that its own choices are based
        on.
        """
        return tuple(SCORES.format(index) for index in range(self.count))


def find_choices(model: ir.Model) -> tuple[ir.Node, ...]:
    """The `TopK` nodes that select the largest values, one for each choice that PyTorch makes when it runs the model.

    A `TopK` of which only the values are used (the best two scores of each group of experts) counts as well, because
    the choices recorded from PyTorch include it: the recorder cannot see whether the indices are used.
    """
    return tuple(
        node
        for node in model.graph
        if node.op_type == "TopK" and node.attributes.get_int("largest", 1) == 1 and _axis(node) is not None
    )


def _axis(node: ir.Node) -> int | None:
    """The axis that a `TopK` works along: -1 for the last, otherwise counted from the front; None if unknown."""
    axis, scores = node.attributes.get_int("axis", -1), node.inputs[0]
    if axis == -1:
        return axis
    if scores is None or scores.shape is None or node.outputs[1].shape is None:
        return None
    rank = len(scores.shape)
    return -1 if axis % rank == rank - 1 else axis % rank


def _moved(value: ir.Value, axis: int, to: int, name: str) -> tuple[ir.Value, list[ir.Node]]:
    """A value with one axis moved to another position, and the `Transpose` that does it, if one is needed."""
    if axis == to or value.shape is None:
        return value, []
    axis %= len(value.shape)
    order = [other for other in range(len(value.shape)) if other != axis]
    order.insert(to % len(value.shape), axis)
    if order == list(range(len(order))):
        return value, []
    node = ir.node("Transpose", [value], {"perm": order}, name=name)
    node.outputs[0].name, node.outputs[0].type = name, value.type
    node.outputs[0].shape = ir.Shape([value.shape[other] for other in order])
    return node.outputs[0], [node]


def _known(node: ir.Node) -> int:
    axis = _axis(node)
    assert axis is not None  # `find_choices` returns only nodes with a known axis
    return axis


def with_choices_out(model: ir.Model, *, scores: bool = False) -> ir.Model:
    """A copy of a graph that also returns its choices, and on request the scores that they are based on."""
    copy = model.clone()
    for index, node in enumerate(find_choices(copy)):
        _return(copy, node.outputs[1], _known(node), CHOICE.format(index))
        if scores:
            assert node.inputs[0] is not None
            _return(copy, node.inputs[0], _known(node), SCORES.format(index))
    return copy


def with_forced_choices(model: ir.Model) -> ir.Model:
    """A copy of a graph that takes its choices as inputs; it also returns its own choices and their scores."""
    copy = model.clone()
    for index, node in enumerate(find_choices(copy)):
        scores, positions, axis = node.inputs[0], node.outputs[1], _known(node)
        assert scores is not None
        shape = positions.shape
        if axis != -1 and shape is not None:
            shape = ir.Shape([*(size for place, size in enumerate(shape) if place != axis), shape[axis]])
        outside = ir.Value(name=FORCED.format(index), shape=shape, type=ir.TensorType(ir.DataType.INT64))
        copy.graph.inputs.append(outside)
        given, turned = _moved(outside, -1, axis, f"{node.name}.turned")
        for turn in turned:
            copy.graph.insert_before(node, turn)
        picked = ir.node("GatherElements", [scores, given], {"axis": axis}, name=f"{node.name}.picked")
        kept = ir.node("Identity", [given], name=f"{node.name}.given")
        for made, old in ((picked, node.outputs[0]), (kept, positions)):
            value = made.outputs[0]
            value.name, value.type, value.shape = old.name, old.type, old.shape
            old.name = f"{old.name}.own"
            old.replace_all_uses_with(value, replace_graph_outputs=True)
            node.append(made)
        _return(copy, positions, axis, CHOICE.format(index))
        _return(copy, scores, axis, SCORES.format(index))
    return copy


def _return(model: ir.Model, value: ir.Value, axis: int, name: str) -> None:
    """Make a value an output of the model, with the axis of the choice last."""
    value, turned = _moved(value, axis, -1, f"turn_{name}")
    for turn in turned:
        model.graph.append(turn)
    node = ir.node("Identity", [value], name=f"return_{name}")
    node.outputs[0].name = name
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
