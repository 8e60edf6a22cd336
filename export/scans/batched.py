"""`BatchedOverTime`: what a step computes from what it reads, computed for many steps at once.

    step     Unsqueeze(dt[h]) ─▶ * x[h, p]                of one step
    many     Unsqueeze(dt[l, h]) ─▶ * x[l, h, p]          of l steps: a batch dimension, wherever it stands

Time is one more axis of every value that depends on the step; all other values stay unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from moe_export.errors import RefusedError
from moe_export.export.sizes import same_dim
from moe_export.graph_builder import GraphBuilder

POINTWISE = {
    "Abs", "Add", "And", "Cast", "Ceil", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min",
    "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign",
    "Sqrt", "Sub", "Tanh", "Where",
}  # fmt: skip
REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
}  # fmt: skip


_SYMBOLIC = 64  # stands for an unknown size where amounts are compared


@dataclass(frozen=True)
class BatchedValue:
    """A value of the step, for many steps at once.

    Attributes:
        value: The values of all steps along `axis`, or the one value that every step has.
        axis: The axis of time in `value`; None if it is the same in each step.
        rank: How many axes the value of one step has.
    """

    value: ir.Value
    axis: int | None
    rank: int

    @property
    def behind(self) -> int:
        """How many axes come after time."""
        return self.rank - (self.axis or 0)


class BatchedOverTime:
    """Computes the values of many steps at once, as they are asked for.

    Args:
        nodes: Where nodes are written.
        known: Values of the step that are already batched over time.
        body: The values that the step computes.
        outside: Gives any other value, batched; by default it is the same in each step.
    """

    def __init__(
        self,
        nodes: GraphBuilder,
        known: Mapping[ir.Value, BatchedValue],
        body: set[ir.Value],
        outside: Callable[[ir.Value], BatchedValue] | None = None,
    ) -> None:
        self._nodes, self._known, self._body = nodes, dict(known), body
        self._outside = outside or _same

    def of(self, value: ir.Value) -> BatchedValue:
        """A value of the step, batched over time.

        Raises:
            RefusedError: An operator that it is computed by cannot be batched.
        """
        if value not in self._known:
            if value not in self._body:
                return self._outside(value)
            node = value.producer()
            assert node is not None
            for output, batched in zip(node.outputs, self.step(node), strict=True):
                self._known[output] = batched
        return self._known[value]

    def know(self, value: ir.Value, batched: BatchedValue) -> None:
        """Record what a value of the step is when batched over time."""
        self._known[value] = batched

    def step(self, node: ir.Node) -> Sequence[BatchedValue]:
        """Write one operator of the step, batched over time; its results.

        Raises:
            RefusedError: It cannot be batched, or one of its operands cannot.
        """
        operands = [self.of(value) for value in node.inputs if value is not None]
        rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None or (len(operands) != len(node.inputs) and node.op_type != "Clip"):
            raise RefusedError(f"{node.op_type} cannot be batched over time here")
        return rule(self._nodes, node, operands)


def can(node: ir.Node) -> bool:
    """Whether there is a rule to batch an operator over time; it may still refuse this one."""
    return node.op_type in _RULES and node.domain in ("", "ai.onnx")


def moved(nodes: GraphBuilder, batched: BatchedValue, axis: int) -> BatchedValue:
    """The same value with time at `axis`; unchanged if it has no time."""
    if batched.axis is None or batched.axis == axis:
        return batched
    order = [place for place in range(batched.rank + 1) if place != batched.axis]
    order.insert(axis, batched.axis)
    return BatchedValue(nodes.transposed(batched.value, order), axis, batched.rank)


def flipped(nodes: GraphBuilder, value: ir.Value, axis: int) -> ir.Value:
    """A value reversed along an axis."""
    ends = nodes.ints(-(2**63) + 1)  # beyond the first entry: -1 would mean the last one
    return nodes.op("Slice", value, nodes.ints(-1), ends, nodes.ints(axis), nodes.ints(-1))


def rank_of(value: ir.Value) -> int:
    """How many axes a value has.

    Raises:
        RefusedError: Its shape is unknown.
    """
    if value.shape is None:
        raise RefusedError(f"the shape of {value.name} is unknown")
    return len(value.shape)


def size_of(sizes: Sequence[int | ir.SymbolicDim]) -> int:
    """How many numbers a shape holds; an unknown size counts as 64."""
    return math.prod(size if isinstance(size, int) else _SYMBOLIC for size in sizes)


def amount_of(value: ir.Value, axis: int) -> int:
    """How many numbers one step reads of a value whose time is at `axis`."""
    return size_of([size for place, size in enumerate(value.shape or ()) if place != axis])


def _same(value: ir.Value) -> BatchedValue:
    return BatchedValue(value, None, rank_of(value))


def _aligned(nodes: GraphBuilder, batched: BatchedValue, behind: int) -> ir.Value:
    """A value whose time, if it has one, is followed by `behind` axes, so that it broadcasts against others like it."""
    if batched.axis is None:
        return (
            nodes.unsqueezed(batched.value, [batched.rank - behind])
            if batched.rank > behind
            else batched.value
        )
    if batched.rank >= behind:
        return moved(nodes, batched, batched.rank - behind).value
    value = moved(nodes, batched, 0).value
    return nodes.unsqueezed(value, range(1, 1 + behind - batched.rank))


def _behind(operands: Sequence[BatchedValue], least: int = 0) -> int:
    """How many axes are to follow time: as many as in the operand of the highest rank, but at least `least`."""
    largest = max((one for one in operands if one.axis is not None), key=lambda one: one.rank)
    return max(least, largest.behind)


Rule = Callable[[GraphBuilder, ir.Node, Sequence[BatchedValue]], Sequence[BatchedValue]]


def _pointwise(
    nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]
) -> Sequence[BatchedValue]:
    rank = max(one.rank for one in operands)
    behind = _behind(operands)
    (result,) = nodes.copy(node, [_aligned(nodes, one, behind) for one in operands])
    return [BatchedValue(result, rank - behind, rank)]


def _clip(nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]) -> Sequence[BatchedValue]:
    """Between numbers, one of which may be left out."""
    one, *limits = operands
    if one.axis is None or any(limit.axis is not None for limit in limits):
        raise RefusedError("a Clip to numbers that change from step to step")
    (result,) = nodes.copy(node, [one.value, *node.inputs[1:]])
    return [BatchedValue(result, one.axis, one.rank)]


def _matmul(nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]) -> Sequence[BatchedValue]:
    left, right = operands
    if min(left.rank, right.rank) < 2:
        raise RefusedError("a product with a vector")
    rank = max(left.rank, right.rank)
    if right.axis is None and right.rank == 2 and left.behind >= 1:
        (result,) = nodes.copy(node, [left.value, right.value])
        return [BatchedValue(result, left.axis, rank)]
    behind = _behind(operands, 2)
    (result,) = nodes.copy(node, [_aligned(nodes, one, behind) for one in operands])
    return [BatchedValue(result, rank - behind, rank)]


def _gemm(nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]) -> Sequence[BatchedValue]:
    """`Gemm` of a value over time and a weight → `MatMul` and `Add`."""
    left, right, *bias = operands
    numbers = {key: node.attributes[key].value for key in node.attributes}
    if right.axis is not None or numbers.get("transA", 0):
        raise RefusedError("a Gemm whose second factor changes from step to step")
    if (
        numbers.get("alpha", 1.0) != 1.0
        or numbers.get("beta", 1.0) != 1.0
        or any(b.axis is not None for b in bias)
    ):
        raise RefusedError("a Gemm with an alpha or a beta")
    weight = nodes.op("Transpose", right.value, perm=[1, 0]) if numbers.get("transB", 0) else right.value
    value = nodes.op("MatMul", moved(nodes, left, 0).value, weight)
    if bias:
        value = nodes.op("Add", value, bias[0].value)
    return [BatchedValue(value, 0, 2)]


def axes_of(value: ir.Value | None) -> list[int]:
    """The axes in a constant operand, negative ones as they are.

    Raises:
        RefusedError: The operand is missing, or not a constant.
    """
    tensor = value.const_value if value is not None else None
    if tensor is None:
        raise RefusedError("axes that are not a constant")
    return [int(axis) for axis in tensor.numpy().reshape(-1)]


def _shifted(axes: Sequence[int], rank: int, at: int) -> list[int]:
    """Axes of a step's value as axes of the batched value, whose time comes before the step's axis `at`."""
    return [axis % rank + (axis % rank >= at) for axis in axes]


def _unsqueeze(
    nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]
) -> Sequence[BatchedValue]:
    one = operands[0]
    assert one.axis is not None
    axes = axes_of(node.inputs[1])
    rank = one.rank + len(axes)
    added = {axis % rank for axis in axes}
    old = [place for place in range(rank) if place not in added]  # where the operand's axes end up
    at = old[one.axis - 1] + 1 if one.axis else 0
    return [BatchedValue(nodes.unsqueezed(one.value, sorted(_shifted(axes, rank, at))), at, rank)]


def _squeeze(nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]) -> Sequence[BatchedValue]:
    one = operands[0]
    assert one.axis is not None
    if len(node.inputs) < 2:
        raise RefusedError("a Squeeze that names no axes")
    gone = {axis % one.rank for axis in axes_of(node.inputs[1])}
    at = one.axis - sum(axis < one.axis for axis in gone)
    axes = sorted(_shifted(sorted(gone), one.rank, one.axis))
    return [BatchedValue(nodes.op("Squeeze", one.value, nodes.ints(*axes)), at, one.rank - len(gone))]


def _reduction(
    nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]
) -> Sequence[BatchedValue]:
    one = operands[0]
    assert one.axis is not None
    if len(node.inputs) < 2:
        raise RefusedError("a reduction that names no axes")
    axes = sorted({axis % one.rank for axis in axes_of(node.inputs[1])})
    kept = number_of(node, "keepdims", 1)
    at = one.axis if kept else one.axis - sum(axis < one.axis for axis in axes)
    (result,) = nodes.copy(node, [one.value, nodes.ints(*_shifted(axes, one.rank, one.axis))])
    return [BatchedValue(result, at, one.rank if kept else one.rank - len(axes))]


def number_of(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node, or its default."""
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def _transpose(
    nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]
) -> Sequence[BatchedValue]:
    one = moved(nodes, operands[0], 0)
    order = [axis + 1 for axis in node.attributes["perm"].as_ints()]
    return [BatchedValue(nodes.transposed(one.value, [0, *order]), 0, one.rank)]


def _along(nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]) -> Sequence[BatchedValue]:
    """Operators along one axis of one operand: `Softmax`, `Split`, `Gather` and `Slice` by constants."""
    one, *others = operands
    if one.axis is None or any(other.axis is not None for other in others):
        raise RefusedError(f"{node.op_type} by numbers that change from step to step")
    rank = one.rank
    (axis,) = _shifted([number_of(node, "axis", -1 if "oftmax" in node.op_type else 0)], rank, one.axis)
    results = nodes.copy(node, [one.value, *(other.value for other in others)])
    producer = results[0].producer()
    assert producer is not None
    producer.attributes["axis"] = ir.AttrInt64("axis", axis)
    if node.op_type == "Gather" and others[0].rank != 1:
        if others[0].rank:
            raise RefusedError("a Gather by a matrix")
        return [BatchedValue(results[0], one.axis - (axis < one.axis), rank - 1)]
    return [BatchedValue(result, one.axis, rank) for result in results]


def _slice(nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]) -> Sequence[BatchedValue]:
    one, *others = operands
    if one.axis is None or len(others) < 3 or any(other.axis is not None for other in others):
        raise RefusedError("a Slice by numbers that change from step to step")
    axes = nodes.ints(*_shifted(axes_of(node.inputs[3]), one.rank, one.axis))
    values = [other.value for other in others]
    (result,) = nodes.copy(node, [one.value, *values[:2], axes, *values[3:]])
    return [BatchedValue(result, one.axis, one.rank)]


def _concat(nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]) -> Sequence[BatchedValue]:
    if any(one.axis is None for one in operands):
        raise RefusedError("a Concat with a value that is the same in each step")
    behind, rank = _behind(operands), operands[0].rank
    (result,) = nodes.copy(node, [_aligned(nodes, one, behind) for one in operands])
    producer = result.producer()
    assert producer is not None
    (axis,) = _shifted([number_of(node, "axis", 0)], rank, rank - behind)
    producer.attributes["axis"] = ir.AttrInt64("axis", axis)
    return [BatchedValue(result, rank - behind, rank)]


def _reshape(nodes: GraphBuilder, node: ir.Node, operands: Sequence[BatchedValue]) -> Sequence[BatchedValue]:
    """Time keeps its place if the axes in front of it keep theirs, else it moves to the front.

    A size after time that is not a number has to stay what and where it is: 0 in the target copies it.
    """
    old, new = (value.shape if value is not None else None for value in (node.inputs[0], node.outputs[0]))
    if old is None or new is None:
        raise RefusedError("a Reshape of an unknown shape")
    same = [same_dim(left, right) for left, right in zip(old, new, strict=False)]
    at = operands[0].axis or 0
    if not all(same[:at]) or len(same) < at:
        at = 0
    target = [0] * (at + 1)
    for place, size in enumerate(new):
        if place >= at and not isinstance(size, int) and not (place < len(same) and same[place]):
            raise RefusedError("a Reshape to computed sizes")
        target += [size if isinstance(size, int) else 0] if place >= at else []
    value = moved(nodes, operands[0], at).value
    return [BatchedValue(nodes.op("Reshape", value, nodes.ints(*target)), at, len(new))]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Split", "Gather"), _along),
    "Clip": _clip,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Slice": _slice,
    "Concat": _concat,
    "Reshape": _reshape,
}
