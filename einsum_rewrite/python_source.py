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


def to_python(plan: Plan, names: Sequence[str] | None = None, result: str = "out") -> str:
    """The lines of Python that compute a plan.

    Args:
        plan: What to write.
        names: A variable name for each operand; x, y, z, ... by default.
        result: The name that the last line assigns to; "" for a bare expression.

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
    return "\n".join(_lines(plan, names, result))


def _lines(plan: Plan, names: Sequence[str], result: str) -> list[str]:
    values = [Text(name) for name in names]
    lines: list[str] = []
    taken = {*names, result}
    for step in plan.steps:
        inputs = [values[value] for value in step.inputs]
        text = _write_step(plan, step, inputs, names)
        for value in sorted(step.inputs, key=lambda value: -len(values[value].code)):
            if len(text.code) > WIDTH and value >= len(names):
                name = _fresh(taken)
                lines.append(f"{name} = {values[value].code}")
                values[value] = Text(name)
                text = _write_step(plan, step, [values[value] for value in step.inputs], names)
        values.append(text)
    final = values[plan.result].code
    return [*lines, f"{result} = {final}" if result else final]


def _fresh(taken: set[str]) -> str:
    number = 1
    while f"t{number}" in taken:
        number += 1
    taken.add(f"t{number}")
    return f"t{number}"


def _write_step(plan: Plan, step: Step, inputs: list[Text], names: Sequence[str]) -> Text:
    action, x = step.action, inputs[0]
    before = plan.layout(step.inputs[0])
    if isinstance(action, Multiply):
        return Text(f"{inputs[0].safe} * {inputs[1].safe}", atom=False)
    if isinstance(action, MatMul):
        return Text(f"{inputs[0].safe} @ {inputs[1].safe}", atom=False)
    if isinstance(action, Sum):
        whole = len(action.axes) == len(before)
        return Text(f"{x.safe}.sum({'' if whole else _axes(action.axes, len(before))})")
    if isinstance(action, Diagonal):
        return Text(f"{x.safe}.diagonal(dim1={action.first}, dim2={action.second})")
    if isinstance(action, Squeeze):
        return Text(f"{x.safe}.squeeze({_axes(action.axes, len(before))})")
    if isinstance(action, Unsqueeze):
        return Text(_unsqueeze(x, action.axes, len(step.layout)))
    if isinstance(action, Permute):
        return Text(_permute(x, action.order))
    return Text(_reshape(plan, x, before, step.layout, names))


def _axes(axes: tuple[int, ...], rank: int) -> str:
    """`-1` for the last axis, as people write it; a tuple for several."""
    if len(axes) == 1:
        return "-1" if axes[0] == rank - 1 else str(axes[0])
    return str(axes)


def _unsqueeze(x: Text, axes: tuple[int, ...], rank: int) -> str:
    if len(axes) == 1:
        return f"{x.safe}.unsqueeze({_axes(axes, rank)})"
    index = ", ".join("None" if axis in axes else ":" for axis in range(max(axes) + 1))
    return f"{x.safe}[{index}]" if max(axes) == rank - 1 else f"{x.safe}[{index}, ...]"


def _permute(x: Text, order: tuple[int, ...]) -> str:
    moved = [i for i, axis in enumerate(order) if i != axis]
    if len(moved) == 2:
        last = moved == [len(order) - 2, len(order) - 1]
        return f"{x.safe}.transpose({'-2, -1' if last else f'{moved[0]}, {moved[1]}'})"
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
