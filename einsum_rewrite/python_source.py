"""A plan as the PyTorch lines a person would write.

    b l d_in, d_in n -> b l d_in n      delta.unsqueeze(-1) * A
    bnd,bnd->bn                         (x * y).sum(-1)
    bshd,bthd->bhst                     q.transpose(1, 2) @ k.permute(0, 2, 3, 1)

Every value that a plan makes is used once, so the lines nest into one expression until that gets long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from moe_export.einsum_rewrite.layout import UNIT, Axis, Layout, Permute, Squeeze, Unsqueeze, flat, plain
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


@dataclass(frozen=True)
class Count:
    """How axes are numbered.

    Attributes:
        from_end: Count all axes from the end.
        around: A label that stands for any number of axes: those behind it are counted from the end, those
            before it from the front, and no line may name an axis of its own.
    """

    from_end: bool = False
    around: str | None = None

    def axis(self, axis: int, layout: Layout) -> int:
        """The number of an axis."""
        if self.around is None:
            return axis - len(layout) if self.from_end else axis
        if self.around in layout[axis]:
            raise EquationError("an axis that stands for any number of axes has no number of its own")
        return axis - len(layout) if (self.around,) in layout[:axis] else axis

    def many(self, layout: Layout) -> bool:
        """Whether a layout has the label that stands for any number of axes."""
        return self.around is not None and (self.around,) in layout


def to_python(
    plan: Plan,
    names: Sequence[str] | None = None,
    result: str = "out",
    *,
    from_end: bool = False,
    around: str | None = None,
) -> str:
    """The lines of Python that compute a plan.

    Args:
        plan: What to write.
        names: A variable name for each operand; x, y, z, ... by default.
        result: The name that the last line assigns to; "" for a bare expression.
        from_end: Count axes from the end, so that the lines hold for any number of leading dimensions.
        around: A label that stands for any number of dimensions (see `Count`).

    Returns:
        One statement a line. As `Tensor.sum` does, sums widen int32 to int64 and bool to int64.

    Raises:
        EquationError: The number of names is wrong, or a line would have to name an axis of `around`.
    """
    count = len(plan.operands)
    if names is None:
        names = NAMES[:count] if count <= len(NAMES) else [f"x{k}" for k in range(count)]
    if len(names) != count:
        raise EquationError(
            f"the equation has {count} operand{'s' * (count != 1)} and got {len(names)} names",
            where=str(plan.equation),
        )
    return "\n".join(_lines(plan, names, result, Count(from_end, around)))


def _lines(plan: Plan, names: Sequence[str], result: str, count: Count) -> list[str]:
    values = [Text(name) for name in names]
    lines: list[str] = []
    taken = {*names, result}
    for step in plan.steps:
        inputs = [values[value] for value in step.inputs]
        text = _write_step(plan, step, inputs, names, count)
        for value in sorted(step.inputs, key=lambda value: -len(values[value].code)):
            if len(text.code) > WIDTH and value >= len(names):
                name = _fresh(taken)
                lines.append(f"{name} = {values[value].code}")
                values[value] = Text(name)
                text = _write_step(plan, step, [values[value] for value in step.inputs], names, count)
        values.append(text)
    final = values[plan.result].code
    return [*lines, f"{result} = {final}" if result else final]


def _fresh(taken: set[str]) -> str:
    number = 1
    while f"t{number}" in taken:
        number += 1
    taken.add(f"t{number}")
    return f"t{number}"


def _write_step(plan: Plan, step: Step, inputs: list[Text], names: Sequence[str], count: Count) -> Text:
    action, x = step.action, inputs[0]
    before = plan.layout(step.inputs[0])
    if isinstance(action, Multiply):
        return Text(f"{inputs[0].safe} * {inputs[1].safe}", atom=False)
    if isinstance(action, MatMul):
        return Text(f"{inputs[0].safe} @ {inputs[1].safe}", atom=False)
    if isinstance(action, Sum):
        whole = len(action.axes) == len(before) and not count.from_end
        return Text(f"{x.safe}.sum({'' if whole else _axes(action.axes, before, count)})")
    if isinstance(action, Diagonal):
        first, second = (count.axis(axis, before) for axis in (action.first, action.second))
        return Text(f"{x.safe}.diagonal(dim1={first}, dim2={second})")
    if isinstance(action, Squeeze):
        return Text(f"{x.safe}.squeeze({_axes(action.axes, before, count)})")
    if isinstance(action, Unsqueeze):
        return Text(_unsqueeze(x, action.axes, step.layout, count))
    if isinstance(action, Permute):
        return Text(_permute(x, action.order, before, count))
    return Text(_reshape(plan, x, before, step.layout, names, count))


def _axes(axes: tuple[int, ...], layout: Layout, count: Count) -> str:
    """`-1` for the last axis, as people write it; a tuple for several."""
    numbers = [count.axis(axis, layout) for axis in axes]
    if len(axes) == 1:
        return "-1" if axes[0] == len(layout) - 1 else str(numbers[0])
    return str(tuple(numbers))


def _unsqueeze(x: Text, axes: tuple[int, ...], layout: Layout, count: Count) -> str:
    if len(axes) == 1:
        return f"{x.safe}.unsqueeze({_axes(axes, layout, count)})"
    index = ["None" if axis in axes else ":" for axis in range(len(layout))]
    if count.many(layout):
        place = layout.index((count.around or "",))
        front, back = " ".join(index[:place]).rstrip(": "), " ".join(index[place + 1 :]).lstrip(": ")
        return f"{x.safe}[{', '.join([*front.split(), '...', *back.split()])}]"
    if count.from_end:
        return f"{x.safe}[..., {', '.join(index[min(axes) :])}]"
    written = ", ".join(index[: max(axes) + 1])
    return f"{x.safe}[{written}]" if max(axes) == len(layout) - 1 else f"{x.safe}[{written}, ...]"


def _permute(x: Text, order: tuple[int, ...], before: Layout, count: Count) -> str:
    moved = [i for i, axis in enumerate(order) if i != axis]
    after = tuple(before[axis] for axis in order)
    if len(moved) == 2 and not any(count.many((after[i],)) for i in moved):
        last = moved == [len(order) - 2, len(order) - 1]
        first, second = (count.axis(axis, before) for axis in moved)
        return f"{x.safe}.transpose({'-2, -1' if last else f'{first}, {second}'})"
    if count.many(before):
        return f"{x.safe}.movedim({_movement(order, before, after, count)})"
    return f"{x.safe}.permute({', '.join(map(str, order))})"


def _movement(order: tuple[int, ...], before: Layout, after: Layout, count: Count) -> str:
    """From where to where: as few axes as possible, and not the one that stands for many."""
    many = before.index((count.around or "",))
    stay = max(
        (rest for size in range(len(order) + 1) for rest in combinations(order, size)
         if many in rest and list(rest) == sorted(rest)),
        key=len,
    )  # fmt: skip
    moved = [i for i, axis in enumerate(order) if axis not in stay]
    sources = [count.axis(order[i], before) for i in moved]
    goals = [count.axis(i, after) for i in moved]
    if len(moved) == 1:
        return f"{sources[0]}, {goals[0]}"
    return f"{tuple(sources)}, {tuple(goals)}"


def _reshape(plan: Plan, x: Text, before: Layout, after: Layout, names: Sequence[str], count: Count) -> str:
    count = replace(count, from_end=False)  # sizes and folds count from the front
    folded = _only_fold(before, after)
    if folded is not None:
        first, last = folded
        start = _axes((first,), before, count)
        if count.around is not None and last == len(before) - 1:
            return f"{x.safe}.flatten({start if first else ''})"
        return f"{x.safe}.flatten({start}, {_axes((last,), before, count)})"
    unfolded = _only_fold(after, before)
    if unfolded is not None:
        first, last = unfolded
        sizes = [_size(plan, (label,), names, count) for axis in after[first : last + 1] for label in axis]
        return f"{x.safe}.unflatten({_axes((first,), before, count)}, ({', '.join(sizes)}))"
    between = _one_axis_apart(before, after) if count.many(before) else None
    if between is not None:
        x = Text(_reshape(plan, x, before, between, names, count))
        return _reshape(plan, x, between, after, names, count)
    return f"{x.safe}.reshape({', '.join(_size(plan, axis, names, count) for axis in after)})"


def _only_fold(many: Layout, few: Layout) -> tuple[int, int] | None:
    """The run of axes of `many` that `few` has as one axis, if that is the only difference."""
    for first, axis in enumerate(few):
        if first >= len(many) or many[first] != axis:
            last = first + len(axis) - 1
            if len(axis) < 2 or many != (*few[:first], *((label,) for label in axis), *few[first + 1 :]):
                return None
            return first, last
    return None


def _one_axis_apart(before: Layout, after: Layout) -> Layout | None:
    """A layout on the way, one fold from the one of two that has several; None where units come or go too."""
    spelled = plain(flat(before))
    few, many = (after, before) if before == spelled else (before, after)
    folds = [i for i, axis in enumerate(few) if len(axis) > 1]
    if many != spelled or UNIT in few or len(folds) < 2:
        return None
    first = folds[0]
    return (*few[:first], *plain(few[first]), *few[first + 1 :])


def _size(plan: Plan, axis: Axis, names: Sequence[str], count: Count) -> str:
    factors = []
    for label in axis:
        size = plan.sizes[label]
        operand, position = plan.size_sources[label]
        number = count.axis(position, plan.operands[operand])
        factors.append(str(size) if isinstance(size, int) else f"{names[operand]}.shape[{number}]")
    return " * ".join(factors) or "1"
