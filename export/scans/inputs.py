"""`move_inwards`: values computed for all steps at once, only to be read step by step, are computed in the step.

    before   exp(delta[b, l, d, 1] * A[d, n]) ─▶ Element (b, d, n)        b * l * d * n values are written and read
    after    Element(delta) (b, d) ─▶ unsqueeze ─▶ * A ─▶ exp             b * l * d values are read

Only elementwise operators and views are moved, and only where the step then reads less: a product that is broadcast,
and what follows it. The amount of work stays the same, but it is done in cache rather than in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from moe_export.export.scans.batched import amount_of
from moe_export.export.scans.loop_region import new_element, with_elements

_POINTWISE = {
    "Abs", "Add", "Cast", "Div", "Exp", "Log", "Mul", "Neg", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt",
    "Sub", "Tanh",
}  # fmt: skip


@dataclass(frozen=True)
class _Moved:
    """How the step gets a value over time: it reads it (no node), or computes it by `node` from `operands`.

    Attributes:
        axis: The axis of time in `value`; None if it has none.
        amount: How many numbers a step reads for it.
    """

    value: ir.Value
    axis: int | None
    amount: int
    node: ir.Node | None = None
    operands: tuple[_Moved, ...] = ()


def move_inwards(graph: ir.Graph, end: ir.Node) -> None:
    """Move computations that only feed a loop region into it, in place, where the loop then reads less."""
    states, count = (int(end.attributes[name].as_int()) for name in ("states", "elements"))
    boundaries = [value.producer() for value in end.inputs[states : states + count] if value is not None]
    reads = _Reads(graph, end, int(end.attributes["loop"].as_int()))
    for boundary in boundaries:
        assert boundary is not None
        source, axis = boundary.inputs[0], int(boundary.attributes["axis"].as_int())
        assert source is not None
        moved = _plan(source, axis, boundary)
        new = reads.boundary(source, axis, boundary) if moved.node is None else reads.write(moved, boundary)
        if new is not boundary.outputs[0]:
            boundary.outputs[0].replace_all_uses_with(new)
    elements = [node.outputs[0] for node in reads.boundaries]
    with_elements(end, elements)
    graph.remove(
        [boundary for boundary in boundaries if boundary is not None and boundary not in reads.boundaries],
        safe=True,
    )


def _plan(value: ir.Value, axis: int | None, user: ir.Node) -> _Moved:
    """The way to get a value in a step that reads the fewest numbers."""
    amount = 0 if axis is None else amount_of(value, axis)
    as_read = _Moved(value, axis, amount)
    node = value.producer()
    if axis is None or node is None or node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return as_read
    if any(other is not user for other, _ in value.uses()) or value.is_graph_output():
        return as_read  # others read it too, so it is computed anyway
    axes = _operand_axes(node, value, axis)
    if axes is None:
        return as_read
    operands = tuple(_plan(operand, at, node) for operand, at in zip(_inputs(node), axes, strict=True))
    distinct = {(operand.value, operand.axis): operand.amount for operand in operands}
    inside = sum(distinct.values())
    return _Moved(value, axis, inside, node, operands) if inside < amount else as_read


def _inputs(node: ir.Node) -> list[ir.Value]:
    values = [value for value in node.inputs if value is not None]
    return values[:1] if node.op_type == "Unsqueeze" else values


def _operand_axes(node: ir.Node, value: ir.Value, axis: int) -> list[int | None] | None:
    """The axis of time in each operand, None where it has none; None for an operator that cannot be moved."""
    if node.op_type == "Unsqueeze":
        added = _added(node, value)
        return None if added is None or axis in added else [axis - sum(place < axis for place in added)]
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return [int(node.attributes["perm"].as_ints()[axis])]
    if node.op_type not in _POINTWISE or value.shape is None:
        return None
    axes: list[int | None] = []
    for operand in _inputs(node):
        if operand.shape is None:
            return None
        place = axis - (len(value.shape) - len(operand.shape))
        if place >= 0 and operand.shape[place] == 1:
            return None  # broadcast over time
        axes.append(place if place >= 0 else None)
    return axes


def _added(node: ir.Node, value: ir.Value) -> list[int] | None:
    constant = node.inputs[1].const_value if node.inputs[1] is not None else None
    if constant is None or value.shape is None:
        return None
    return [int(axis) % len(value.shape) for axis in constant.numpy().reshape(-1)]


class _Reads:
    """Writes elements and the moved operators in front of a boundary node; one element for each value and axis."""

    def __init__(self, graph: ir.Graph, end: ir.Node, loop: int) -> None:
        self._graph, self._end, self._loop = graph, end, loop
        self._known: dict[tuple[Any, ...], ir.Node] = {}
        self.boundaries: list[ir.Node] = []

    def boundary(self, value: ir.Value, axis: int, like: ir.Node) -> ir.Value:
        """An element of a value along an axis, read in the direction of another boundary node."""
        backwards = int(like.attributes["backwards"].as_int())
        key = (value, axis, backwards)
        if key not in self._known:
            own = like.inputs[0] is value and int(like.attributes["axis"].as_int()) == axis
            node = (
                like
                if own
                else new_element(
                    self._graph,
                    like,
                    value,
                    axis,
                    loop=self._loop,
                    place=len(self.boundaries),
                    backwards=backwards,
                )
            )
            self._known[key] = node
            self.boundaries.append(node)
        return self._known[key].outputs[0]

    def write(self, moved: _Moved, boundary: ir.Node) -> ir.Value:
        """Write how the step gets a value; the value of one step."""
        if moved.node is None:
            return moved.value if moved.axis is None else self.boundary(moved.value, moved.axis, boundary)
        assert moved.axis is not None
        inputs: list[ir.Value | None] = [self.write(operand, boundary) for operand in moved.operands]
        attributes = dict(moved.node.attributes)
        if moved.node.op_type == "Transpose":
            time = moved.operands[0].axis
            assert time is not None
            order = [axis - (axis > time) for axis in attributes["perm"].as_ints() if axis != time]
            if order == sorted(order) and inputs[0] is not None:
                return inputs[0]
            attributes["perm"] = ir.AttrInt64s("perm", order)
        if moved.node.op_type == "Unsqueeze":
            inputs.append(self._axes(moved, boundary))
        node = ir.node(moved.node.op_type, inputs, attributes=attributes)
        node.metadata_props.update(moved.node.metadata_props)
        shape = [size for place, size in enumerate(moved.value.shape or ()) if place != moved.axis]
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), moved.value.type
        node.outputs[0].name = f"{moved.value.name}_step_{self._loop}"
        self._graph.insert_before(boundary, node)
        return node.outputs[0]

    def _axes(self, moved: _Moved, boundary: ir.Node) -> ir.Value:
        assert moved.node is not None
        assert moved.axis is not None
        added = _added(moved.node, moved.value) or []
        axes = [axis - (axis > moved.axis) for axis in added]
        constant = ir.node("Constant", [], attributes={"value_ints": axes})
        constant.outputs[0].name = f"{moved.value.name}_axes_{self._loop}"
        constant.outputs[0].shape = ir.Shape([len(axes)])
        constant.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        self._graph.insert_before(boundary, constant)
        return constant.outputs[0]
