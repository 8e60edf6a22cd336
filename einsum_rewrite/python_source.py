"""A plan as the PyTorch lines a person would write.

    b l d_in, d_in n -> b l d_in n      delta.unsqueeze(-1) * A
    bnd,bnd->bn                         (x * y).sum(-1)
    bshd,bthd->bhst                     q.transpose(1, 2) @ k.permute(0, 2, 3, 1)

Every value that a plan makes is used once, so the lines nest into one expression until that gets long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_export.einsum_rewrite.layout import Axis, Layout, Permute, Squeeze, Unsqueeze
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.steps import Diagonal, MatMul, Multiply, Step, Sum
from moe_export.errors import EquationError

WIDTH = 88
"""An expression that would be longer is given a name and a line of its own."""

NAMES = "xyzuvw"


@dataclass(frozen=True)
class Text:
    """An expression, and whether it needs parentheses in front of a `.method` or beside an operator."""

    code: str
    atom: bool = True

    @property
    def safe(self) -> str:
        """The code as one operand."""
        return self.code if self.atom else f"({self.code})"


def to_python(
    plan: Plan, names: Sequence[str] | None = None, result: str = "out", *, from_end: bool = False
) -> str:
    """The lines of Python that compute a plan.

    Args:
        plan: What to write.
        names: A variable name for each operand; x, y, z, ... by default.
        result: The name that the last line assigns to; "" for a bare expression.
        from_end: Count axes from the end, so that the lines hold for any number of leading dimensions.

    Returns:
        One statement a line. As `Tensor.sum` does, sums widen int32 to int64 and bool to int64.
    """
    count = len(plan.operands)
    if names is None:
        names = NAMES[:count] if count <= len(NAMES) else [f"x{k}" for k in range(count)]
    if len(names) != count:
        raise EquationError(
            f"the equation has {count} operand{'s' * (count != 1)} and got {len(names)} names",
            where=str(plan.equation),
        )
    return "\n".join(_lines(plan, names, result, from_end))


def _lines(plan: Plan, names: Sequence[str], result: str, from_end: bool) -> list[str]:
    values = [Text(name) for name in names]
    lines: list[str] = []
    taken = {*names, result}
    for step in plan.steps:
        inputs = [values[value] for value in step.inputs]
        text = _write_step(plan, step, inputs, names, from_end)
        for value in sorted(step.inputs, key=lambda value: -len(values[value].code)):
            if len(text.code) > WIDTH and value >= len(names):
                name = _fresh(taken)
                lines.append(f"{name} = {values[value].code}")
                values[value] = Text(name)
                text = _write_step(plan, step, [values[value] for value in step.inputs], names, from_end)
        values.append(text)
    final = values[plan.result].code
    return [*lines, f"{result} = {final}" if result else final]


def _fresh(taken: set[str]) -> str:
    number = 1
    while f"t{number}" in taken:
        number += 1
    taken.add(f"t{number}")
    return f"t{number}"


def _write_step(plan: Plan, step: Step, inputs: list[Text], names: Sequence[str], from_end: bool) -> Text:
    action, x = step.action, inputs[0]
    before = plan.layout(step.inputs[0])
    if isinstance(action, Multiply):
        return Text(f"{inputs[0].safe} * {inputs[1].safe}", atom=False)
    if isinstance(action, MatMul):
        return Text(f"{inputs[0].safe} @ {inputs[1].safe}", atom=False)
    if isinstance(action, Sum):
        whole = len(action.axes) == len(before) and not from_end
        return Text(f"{x.safe}.sum({'' if whole else _axes(action.axes, len(before), from_end)})")
    if isinstance(action, Diagonal):
        first, second = (_axis(axis, len(before), from_end) for axis in (action.first, action.second))
        return Text(f"{x.safe}.diagonal(dim1={first}, dim2={second})")
    if isinstance(action, Squeeze):
        return Text(f"{x.safe}.squeeze({_axes(action.axes, len(before), from_end)})")
    if isinstance(action, Unsqueeze):
        return Text(_unsqueeze(x, action.axes, len(step.layout), from_end))
    if isinstance(action, Permute):
        return Text(_permute(x, action.order, from_end))
    return Text(_reshape(plan, x, before, step.layout, names))


def _axis(axis: int, rank: int, from_end: bool) -> int:
    return axis - rank if from_end else axis


def _axes(axes: tuple[int, ...], rank: int, from_end: bool = False) -> str:
    """`-1` for the last axis, as people write it; a tuple for several."""
    if len(axes) == 1:
        return "-1" if axes[0] == rank - 1 else str(_axis(axes[0], rank, from_end))
    return str(tuple(_axis(axis, rank, from_end) for axis in axes))


def _unsqueeze(x: Text, axes: tuple[int, ...], rank: int, from_end: bool) -> str:
    if len(axes) == 1:
        return f"{x.safe}.unsqueeze({_axes(axes, rank, from_end)})"
    if from_end:
        index = ", ".join("None" if axis in axes else ":" for axis in range(min(axes), rank))
        return f"{x.safe}[..., {index}]"
    index = ", ".join("None" if axis in axes else ":" for axis in range(max(axes) + 1))
    return f"{x.safe}[{index}]" if max(axes) == rank - 1 else f"{x.safe}[{index}, ...]"


def _permute(x: Text, order: tuple[int, ...], from_end: bool) -> str:
    moved = [i for i, axis in enumerate(order) if i != axis]
    if len(moved) == 2:
        last = moved == [len(order) - 2, len(order) - 1]
        first, second = (_axis(axis, len(order), from_end) for axis in moved)
        return f"{x.safe}.transpose({'-2, -1' if last else f'{first}, {second}'})"
    return f"{x.safe}.permute({', '.join(map(str, order))})"


def _reshape(plan: Plan, x: Text, before: Layout, after: Layout, names: Sequence[str]) -> str:
    folded = _only_fold(before, after)
    if folded is not None:
        first, last = folded
        return f"{x.safe}.flatten({first}, {_axes((last,), len(before))})"
    unfolded = _only_fold(after, before)
    if unfolded is not None:
        first, last = unfolded
        sizes = ", ".join(_size(plan, (label,), names) for axis in after[first : last + 1] for label in axis)
        return f"{x.safe}.unflatten({_axes((first,), len(before))}, ({sizes}))"
    return f"{x.safe}.reshape({', '.join(_size(plan, axis, names) for axis in after)})"


def _only_fold(many: Layout, few: Layout) -> tuple[int, int] | None:
    """The run of axes of `many` that `few` has as one axis, if that is the only difference."""
    for first, axis in enumerate(few):
        if first >= len(many) or many[first] != axis:
            last = first + len(axis) - 1
            if len(axis) < 2 or many != (*few[:first], *((label,) for label in axis), *few[first + 1 :]):
                return None
            return first, last
    return None


def _size(plan: Plan, axis: Axis, names: Sequence[str]) -> str:
    factors = []
    for label in axis:
        size = plan.sizes[label]
        operand, position = plan.size_sources[label]
        factors.append(str(size) if isinstance(size, int) else f"{names[operand]}.shape[{position}]")
    return " * ".join(factors) or "1"
