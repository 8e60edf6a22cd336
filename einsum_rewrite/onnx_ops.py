"""Write the steps of a plan as ONNX operators.

One function a kind of step. The operators go through an `Engine`, so the same code writes nodes
(`onnx_writer`) and computes with NumPy (`onnx_numpy`), which is how a site is proved (`proof`).

    opset 13   axes of Squeeze, Unsqueeze and ReduceSum are an input, before that an attribute
    opset 14   Reshape can be told that a 0 means 0 (`allowzero`)
    opset 15   Shape can return a part of a shape
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from moe_export.einsum_rewrite.layout import Axis, Layout, Permute, Squeeze, Unsqueeze
from moe_export.einsum_rewrite.onnx_shapes import Piece, shape_pieces
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.reshaping import fixed_size, flatten_axis, simple_target
from moe_export.einsum_rewrite.steps import Diagonal, MatMul, Multiply, Step, Sum
from moe_export.errors import EquationError

OLDEST = 12
"""The opset that brought `Einsum`."""

TO_THE_END = 2**63 - 1


class Engine(Protocol):
    """Where the operators of a plan go: into a graph, or to arrays."""

    opset: int

    def call(self, op_type: str, *inputs: Any, **attributes: Any) -> Any:
        """Apply an operator of ONNX's default domain; its one result."""

    def ints(self, values: Sequence[int]) -> Any:
        """A constant int64 vector."""


def run(plan: Plan, operands: Sequence[Any], engine: Engine) -> Any:
    """Compute a plan; the value of the result.

    Args:
        plan: A plan for operands of these shapes.
        operands: What `engine` takes for tensors.
        engine: Where the operators go.

    Raises:
        EquationError: The opset cannot express it.
    """
    values: list[Any] = list(operands)
    for step in plan.steps:
        inputs = [values[value] for value in step.inputs]
        before = plan.layout(step.inputs[0])
        values.append(_run_step(plan, step, inputs, before, operands, engine))
    return values[plan.result]


def _run_step(
    plan: Plan, step: Step, inputs: list[Any], before: Layout, operands: Sequence[Any], engine: Engine
) -> Any:
    action, x = step.action, inputs[0]
    if isinstance(action, Permute):
        return engine.call("Transpose", x, perm=action.order)
    if isinstance(action, Unsqueeze):
        return _with_axes("Unsqueeze", x, action.axes, engine)
    if isinstance(action, Squeeze):
        return _with_axes("Squeeze", x, action.axes, engine)
    if isinstance(action, Sum):
        return _with_axes("ReduceSum", x, action.axes, engine, keepdims=0)
    if isinstance(action, Multiply):
        return engine.call("Mul", *inputs)
    if isinstance(action, MatMul):
        return engine.call("MatMul", *inputs)
    if isinstance(action, Diagonal):
        return _run_diagonal(plan, action, x, before, operands, engine)
    return _reshape(plan, x, before, step.layout, operands, engine)


def _with_axes(op_type: str, x: Any, axes: tuple[int, ...], engine: Engine, **attributes: Any) -> Any:
    if engine.opset < 13:
        return engine.call(op_type, x, axes=axes, **attributes)
    return engine.call(op_type, x, engine.ints(axes), **attributes)


# --- diagonals ----------------------------------------------------------------------------------------------


def _run_diagonal(
    plan: Plan, action: Diagonal, x: Any, before: Layout, operands: Sequence[Any], engine: Engine
) -> Any:
    """ONNX has no diagonal: put both axes last, fold them, and take every (n+1)-th element."""
    pair = (action.first, action.second)
    order = (*(i for i in range(len(before)) if i not in pair), *pair)
    if order != tuple(range(len(before))):
        x = engine.call("Transpose", x, perm=order)
    label = before[action.first]
    rest = tuple(before[i] for i in order[:-2])
    folded = (*rest, label + label)
    x = _reshape(plan, x, (*rest, label, label), folded, operands, engine)
    size = fixed_size(label, plan.sizes)
    if size is not None:
        step = engine.ints([size + 1])
    else:
        step = engine.call("Add", _read(Piece(*_source(plan, label)), operands, engine), engine.ints([1]))
    last = engine.ints([len(folded) - 1])
    return engine.call("Slice", x, engine.ints([0]), engine.ints([TO_THE_END]), last, step)


def _source(plan: Plan, axis: Axis) -> tuple[int, int, int]:
    operand, position = plan.size_sources[axis[0]]
    return operand, position, position + 1


# --- reshapes -----------------------------------------------------------------------------------------------


def _reshape(
    plan: Plan, x: Any, before: Layout, after: Layout, operands: Sequence[Any], engine: Engine
) -> Any:
    """One Reshape with `0` and `-1`, or a Flatten; sizes are looked up only where neither can be right."""
    target = simple_target(before, after, plan.sizes)
    if target is not None:
        return engine.call("Reshape", x, engine.ints(target))
    axis = flatten_axis(before, after)
    if axis is not None:
        return engine.call("Flatten", x, axis=axis)
    if engine.opset < 14:
        return _reshape_without_allowzero(plan, x, before, after, operands, engine)
    return engine.call("Reshape", x, _shape(plan, x, before, after, operands, engine), allowzero=1)


def _reshape_without_allowzero(
    plan: Plan, x: Any, before: Layout, after: Layout, operands: Sequence[Any], engine: Engine
) -> Any:
    """Before opset 14 a 0 always means "as in the operand", so an empty size can only be left open."""
    fixed = [fixed_size(axis, plan.sizes) for axis in after]
    if 0 not in fixed:
        return engine.call("Reshape", x, _shape(plan, x, before, after, operands, engine))
    if fixed.count(0) == 1 and None not in fixed:
        return engine.call("Reshape", x, engine.ints([size or -1 for size in fixed]))
    raise EquationError(
        "several sizes of this einsum are 0 or unknown beside 0, which Reshape cannot express before opset 14",
        where=plan.equation.text,
        hint="convert the model to opset 14 or newer",
    )


def _shape(plan: Plan, x: Any, before: Layout, after: Layout, operands: Sequence[Any], engine: Engine) -> Any:
    """The shape to reshape to, put together from constants and from what tensors have at run time."""
    parts = []
    for piece in shape_pieces(plan, before, after):
        if isinstance(piece, tuple) and not isinstance(piece, Piece):
            parts.append(engine.ints(piece))
        elif isinstance(piece, Piece):
            parts.append(_read(piece, (*operands, x), engine))
        else:
            sizes = _concat([_read(part, (*operands, x), engine) for part in piece], engine)
            parts.append(engine.call("ReduceProd", sizes, keepdims=1))
    return _concat(parts, engine)


def _concat(parts: list[Any], engine: Engine) -> Any:
    return parts[0] if len(parts) == 1 else engine.call("Concat", *parts, axis=0)


def _read(piece: Piece, values: Sequence[Any], engine: Engine) -> Any:
    """Some consecutive sizes of a tensor, as a vector."""
    value = values[piece.value]
    if engine.opset >= 15:
        return engine.call("Shape", value, start=piece.start, end=piece.stop)
    shape = engine.call("Shape", value)
    return engine.call(
        "Slice", shape, engine.ints([piece.start]), engine.ints([piece.stop]), engine.ints([0])
    )
