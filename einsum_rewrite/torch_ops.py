"""Run a plan with torch operators, and `einsum`: a drop-in for `torch.einsum` and `einops.einsum`.

Only operators of ATen are called, through one function, so that the same code computes tensors, is traced by
`torch.export`, and writes nodes into a graph (`program`). Sizes are never compared, so tracing adds no
guards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from moe_export.einsum_rewrite.binding import Size
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.layout import Axis, Layout, Permute, Squeeze, Unsqueeze
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.planner import make_plan
from moe_export.einsum_rewrite.steps import Diagonal, MatMul, Multiply, Step, Sum
from moe_export.errors import EquationError

aten = torch.ops.aten


def einsum(*args: Any) -> torch.Tensor:
    """Compute an einsum by multiplications, sums and matrix products.

    Takes every form of call that `torch.einsum` and `einops.einsum` take:

        einsum("bld,dn->bln", x, w)                     torch: letters, equation first
        einsum("bld,dn->bln", [x, w])                   operands as a list
        einsum(x, [0, 1, 2], w, [2, 3], [0, 1, 3])      sublists; the last one is the output
        einsum(x, w, "b l d_in, d_in n -> b l n")       einops: names, pattern last

    Returns:
        A tensor of the shape and dtype that the original would return.

    Raises:
        EquationError: The equation is malformed or does not fit the operands.
    """
    if torch.compiler.is_dynamo_compiling():
        return _for_the_compiler(args)
    equation, operands = read_call(args)
    plan = make_plan(equation, [known_shape(x) for x in operands], guesses=guesses(operands), target="torch")
    result: torch.Tensor = run(plan, operands)
    return result


def _for_the_compiler(args: Sequence[Any]) -> torch.Tensor:
    """`torch.compile` and strict export read Python, not the planner's: they get the einsum that they know."""
    import einops

    last_is_pattern = isinstance(args[-1], str)
    result: torch.Tensor = einops.einsum(*args) if last_is_pattern else torch.einsum(*args)
    return result


def read_call(args: Sequence[Any]) -> tuple[Equation, list[torch.Tensor]]:
    """Tell the four forms of call apart; the notation follows from the form, never from the string."""
    if args and isinstance(args[0], str):
        operands = args[1:]
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        equation = Equation.parse(args[0], "torch")
    elif len(args) > 1 and isinstance(args[-1], str):
        operands = args[:-1]
        equation = Equation.parse(args[-1], "einops")
    elif len(args) > 1 and isinstance(args[1], list | tuple):
        pairs = len(args) // 2
        operands = args[0 : 2 * pairs : 2]
        output = args[-1] if len(args) % 2 else None
        equation = Equation.from_sublists(args[1 : 2 * pairs : 2], output)
    else:
        raise EquationError(
            "einsum got no equation",
            where=f"einsum({', '.join(type(arg).__name__ for arg in args)})",
            hint="einsum('ij,jk->ik', a, b), einsum(a, b, 'i j, j k -> i k') or einsum(a, [0, 1], b, [1, 2])",
        )
    for number, operand in enumerate(operands):
        if not isinstance(operand, torch.Tensor):
            raise EquationError(
                f"operand {number} is {type(operand).__name__}, not a tensor", where=equation.text
            )
    return equation, list(operands)


def known_shape(tensor: torch.Tensor) -> tuple[Size, ...]:
    """The shape of a tensor; a symbolic size becomes its name, without a guard."""
    return tuple(_known_size(size) for size in tensor.shape)


def guesses(tensors: Sequence[torch.Tensor]) -> dict[str, int]:
    """The sizes that the traced example had, for the symbolic ones."""
    found: dict[str, int] = {}
    for tensor in tensors:
        sizes: Sequence[Any] = tensor.shape
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.has_hint():
                found[str(size.node.expr)] = int(size.node.hint)
    return found


def _known_size(size: int | torch.SymInt) -> Size:
    if not isinstance(size, torch.SymInt):
        return size
    number = size.node.maybe_as_int()
    return str(size.node.expr) if number is None else int(number)


class Engine(Protocol):
    """Where the operators of a plan go: to tensors, or into a graph."""

    def call(self, operator: Any, *args: Any) -> Any:
        """Apply an ATen operator."""

    def size(self, value: Any, axis: int) -> Any:
        """The size of an axis."""

    def product(self, sizes: Sequence[Any]) -> Any:
        """The product of sizes (of numbers, or of what `size` returns)."""

    def dtype(self, value: Any) -> torch.dtype:
        """The dtype of a value."""


class Eager:
    """Call the operators at once."""

    def call(self, operator: Any, *args: Any) -> Any:
        """Apply an ATen operator."""
        return operator(*args)

    def size(self, value: torch.Tensor, axis: int) -> Any:
        """The size of an axis."""
        return value.shape[axis]

    def product(self, sizes: Sequence[Any]) -> Any:
        """The product of sizes."""
        total = 1
        for size in sizes:
            total = total * size
        return total

    def dtype(self, value: torch.Tensor) -> torch.dtype:
        """The dtype of a value."""
        return value.dtype


def run(plan: Plan, operands: Sequence[Any], engine: Engine | None = None) -> Any:
    """Compute a plan.

    Args:
        plan: A plan for operands of these shapes.
        operands: Tensors, or what `engine` takes for them.
        engine: Where the operators go; at once to tensors by default.
    """
    engine = engine or Eager()
    values: list[Any] = list(operands)
    for number, step in enumerate(plan.steps):
        inputs = [values[value] for value in step.inputs]
        values.append(_run_step(plan, step, inputs, operands, engine))
        for value in step.inputs:
            if plan.last_uses[value] == number:
                values[value] = None  # a large intermediate must not outlive its last use
    return values[plan.result]


def _run_step(plan: Plan, step: Step, inputs: list[Any], operands: Sequence[Any], engine: Engine) -> Any:
    action, x = step.action, inputs[0]
    if isinstance(action, Diagonal):
        return engine.call(aten.diagonal.default, x, 0, action.first, action.second)
    if isinstance(action, Permute):
        return engine.call(aten.permute.default, x, list(action.order))
    if isinstance(action, Unsqueeze):
        for axis in action.axes:
            x = engine.call(aten.unsqueeze.default, x, axis)
        return x
    if isinstance(action, Squeeze):
        return engine.call(aten.squeeze.dims, x, list(action.axes))
    if isinstance(action, Sum):
        return _run_sum(action, x, engine)
    if isinstance(action, Multiply):
        return engine.call(aten.mul.Tensor, *inputs)
    if isinstance(action, MatMul):
        return engine.call(aten.matmul.default, *_same_dtype(inputs, engine))
    shape = target_shape(
        step.layout, plan, lambda operand, axis: engine.size(operands[operand], axis), engine
    )
    return engine.call(aten.reshape.default, x, shape)


def _run_sum(action: Sum, x: Any, engine: Engine) -> Any:
    if action.alone:
        return engine.call(aten.sum.dim_IntList, x, list(action.axes))
    dtype = engine.dtype(x)
    if dtype == torch.bool:
        raise EquationError(
            "bool operands can be multiplied, not summed after it", hint="cast them to an integer dtype"
        )
    operator = aten.sum.dim_IntList
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.int64:
        return engine.call(operator, x, list(action.axes))
    return _with_dtype(engine, x, list(action.axes), dtype)


def _with_dtype(engine: Engine, x: Any, axes: list[int], dtype: torch.dtype) -> Any:
    """A sum that does not widen small integers: after a product torch.einsum keeps their dtype."""
    return engine.call(aten.to.dtype, engine.call(aten.sum.dim_IntList, x, axes), dtype)


def _same_dtype(inputs: list[Any], engine: Engine) -> list[Any]:
    """Sums of one operand alone widen integers; a matrix product needs both operands alike."""
    a, b = (engine.dtype(x) for x in inputs)
    if a == b:
        return inputs
    both = torch.promote_types(a, b)
    return [x if engine.dtype(x) == both else engine.call(aten.to.dtype, x, both) for x in inputs]


def target_shape(
    layout: Layout, plan: Plan, read_size: Callable[[int, int], Any], engine: Engine
) -> list[Any]:
    """The shape to reshape to. One size that is unknown stays open (-1) if all others are known and not 0."""
    fixed: list[int | None] = [_fixed_size(axis, plan) for axis in layout]
    if fixed.count(None) == 1 and 0 not in fixed:
        return [-1 if size is None else size for size in fixed]
    return [
        engine.product([_label_size(label, plan, read_size) for label in axis]) if size is None else size
        for axis, size in zip(layout, fixed, strict=True)
    ]


def _fixed_size(axis: Axis, plan: Plan) -> int | None:
    total = 1
    for label in axis:
        size = plan.sizes[label]
        if not isinstance(size, int):
            return None
        total *= size
    return total


def _label_size(label: str, plan: Plan, read_size: Callable[[int, int], Any]) -> Any:
    size = plan.sizes[label]
    return size if isinstance(size, int) else read_size(*plan.size_sources[label])
