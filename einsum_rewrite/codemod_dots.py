"""Lines for an equation with an ellipsis, the same for every number of dimensions that it may stand for.

The equation is planned with one axis in the place of the ellipsis, and then written in one of three ways:

    batch   '... batch d, batch d -> ...'   (x * y).sum((-2, -1))
        No line names that axis: what stands before it counts from the front, what stands behind it from the end.
    front   '..., n -> n ...'               (x.unsqueeze(-1) * y).movedim(-1, 0)
        The ellipsis of every operand is moved to the front, where ellipses of different lengths broadcast.
    fold    '...gi,gio->...go'
        The dimensions are folded into one, and unfolded in the result. `(x.unsqueeze(-2) @ w).squeeze(-2)` is
        shorter, and copies all of `w` for every element of the ellipsis: `torch.matmul` broadcasts by copying.

Whether a writing holds is not decided here: the proof runs it for several numbers of dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moe_export.einsum_rewrite.binding import Size
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.layout import Reshape, Squeeze, Unsqueeze, flat
from moe_export.einsum_rewrite.notation import ELLIPSIS
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.planner import candidates, plan_einsum
from moe_export.einsum_rewrite.python_source import to_python
from moe_export.einsum_rewrite.steps import MatMul
from moe_export.errors import EquationError

MANY = f"{ELLIPSIS}0"
"""The label that stands in a plan for the dimensions of an ellipsis."""

MOST_PLANS = 200
MOST_OPERANDS = 5  # with more, so many plans are not weighed


def writings(equation: Equation, names: Sequence[str]) -> Iterator[str]:
    """Lines that may hold for every length of the ellipsis, the best first; each is still to be proved."""
    yield from _as_batch(equation, names)
    yield from _from_front(equation, names)
    yield from _folded(equation, names)


def _shapes(equation: Equation) -> list[tuple[Size, ...]]:
    return [tuple(None if label == ELLIPSIS else label for label in term) for term in equation.inputs]


# --- batch --------------------------------------------------------------------------------------------------


def _as_batch(equation: Equation, names: Sequence[str]) -> Iterator[str]:
    """Plans in which the ellipsis' axis is neither folded nor named, cheapest first."""
    found: dict[str, None] = {}
    if len(names) > MOST_OPERANDS:
        return
    for _, plan in candidates(equation, _shapes(equation), "torch")[:MOST_PLANS]:
        if _copies_operands(plan) or _grows(plan) or any(_folds(step.layout) for step in plan.steps):
            continue
        try:
            code = to_python(plan, names, result="", around=MANY)
        except EquationError:
            continue
        if code not in found:
            found[code] = None
            yield code


def _folds(layout: Sequence[tuple[str, ...]]) -> bool:
    return any(MANY in axis and len(axis) > 1 for axis in layout)


def _copies_operands(plan: Plan) -> bool:
    """Whether a matrix product repeats a whole stack of matrices for every element of the ellipsis."""
    for step in plan.steps:
        if isinstance(step.action, MatMul):
            layouts = [plan.layout(value) for value in step.inputs]
            without = [layout for layout in layouts if MANY not in flat(layout)]
            if len(without) == 1 and sum(map(bool, without[0])) > 2:
                return True
    return False


def _grows(plan: Plan) -> bool:
    """Whether a value has the ellipsis beside more labels than any operand with it, and the result, have."""
    given = [layout for layout in plan.operands if (MANY,) in layout]
    widest = max(map(len, [*given, plan.output]))
    return any(MANY in flat(step.layout) and len(flat(step.layout)) > widest for step in plan.steps)


# --- front --------------------------------------------------------------------------------------------------


def _from_front(equation: Equation, names: Sequence[str]) -> Iterator[str]:
    """Every ellipsis moved to the front, and the result's back to its place."""
    inputs, output = tuple(map(_dots_first, equation.inputs)), _dots_first(equation.output)
    if (inputs, output) == (equation.inputs, equation.output):
        return
    moved = Equation(equation.text, equation.notation, inputs, output)
    written = [name + _to_front(term) for name, term in zip(names, equation.inputs, strict=True)]
    for code in _as_batch(moved, written):
        *before, last = code.split("\n")
        back = _from_front_to(equation.output)
        yield "\n".join([*before, f"{_safe(last)}{back}" if back else last])


def _dots_first(term: tuple[str, ...]) -> tuple[str, ...]:
    if ELLIPSIS not in term:
        return term
    return (ELLIPSIS, *(label for label in term if label != ELLIPSIS))


def _to_front(term: tuple[str, ...]) -> str:
    """`.movedim(0, -1)`: what stands before an ellipsis moves behind it."""
    ahead, rest = _ahead(term)
    return _movedim(list(range(ahead)), [axis - ahead - rest for axis in range(ahead)])


def _from_front_to(term: tuple[str, ...]) -> str:
    ahead, rest = _ahead(term)
    return _movedim([axis - ahead - rest for axis in range(ahead)], list(range(ahead)))


def _ahead(term: tuple[str, ...]) -> tuple[int, int]:
    """How many labels stand before the ellipsis, and how many behind."""
    ahead = term.index(ELLIPSIS) if ELLIPSIS in term else 0
    return ahead, len(term) - ahead - 1


def _movedim(sources: list[int], goals: list[int]) -> str:
    if len(sources) < 2:
        return f".movedim({sources[0]}, {goals[0]})" if sources else ""
    return f".movedim({tuple(sources)}, {tuple(goals)})"


# --- fold ---------------------------------------------------------------------------------------------------


def _folded(equation: Equation, names: Sequence[str]) -> Iterator[str]:
    """The dimensions of the only ellipsis as one, which the result unfolds."""
    dotted = [index for index, term in enumerate(equation.inputs) if ELLIPSIS in term]
    if len(dotted) != 1:
        return
    place = dotted[0]
    ahead, rest = _ahead(equation.inputs[place])
    last = f", {-1 - rest}" if rest else ""
    one = f"{names[place]}.unsqueeze({ahead}).flatten({ahead}{last})"
    written = [one if index == place else name for index, name in enumerate(names)]
    plan = plan_einsum(equation, *_shapes(equation), target="torch")
    unfolds = ELLIPSIS in equation.output
    code = to_python(_without_last_moves(plan) if unfolds else plan, written, result="")
    for axis in range(ahead + rest + 1):  # sizes are read off the operand itself
        number = axis if axis < ahead else axis - ahead - rest - 1
        if axis != ahead:
            code = code.replace(f"{one}.shape[{axis}]", f"{names[place]}.shape[{number}]")
    if unfolds:
        *before, expression = code.split("\n")
        sizes = ", ".join(_sizes(equation, names))
        code = "\n".join([*before, f"{_safe(expression)}.reshape({sizes})"])
    yield code


def _without_last_moves(plan: Plan) -> Plan:
    """A plan without the moves at its end that only regroup axes: the reshape of the result does that too."""
    while plan.steps and isinstance(plan.steps[-1].action, Reshape | Squeeze | Unsqueeze):
        if plan.result != len(plan.operands) + len(plan.steps) - 1:
            break
        plan = replace(plan, steps=plan.steps[:-1], result=plan.steps[-1].inputs[0])
    return plan


def _sizes(equation: Equation, names: Sequence[str]) -> list[str]:
    """The result's shape in as few slices of the operands' shapes as possible."""
    sizes, start = [], 0
    while start < len(equation.output):
        length, operand, position = max(
            (_common(term[position:], equation.output[start:]), -operand, -position)
            for operand, term in enumerate(equation.inputs)
            for position in range(len(term))
        )
        sizes.append(_slice(names[-operand], equation.inputs[-operand], -position, length))
        start += length
    return sizes


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many labels two terms have in common from the start on."""
    for length, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return length
    return min(len(one), len(other))


def _slice(name: str, term: tuple[str, ...], start: int, length: int) -> str:
    def number(axis: int) -> int:
        return axis - len(term) if ELLIPSIS in term[:axis] else axis

    stop = start + length
    if length == 1 and term[start] != ELLIPSIS:
        return f"{name}.shape[{-1 if stop == len(term) else number(start)}]"
    return f"*{name}.shape[{number(start) if start else ''}:{number(stop) if stop < len(term) else ''}]"


def _safe(code: str) -> str:
    """An expression that a method may follow."""
    return f"({code})" if any(f" {sign} " in _outside(code) for sign in "*@") else code


def _outside(code: str) -> str:
    """What stands in no brackets."""
    depth, kept = 0, []
    for letter in code:
        depth += (letter in "([") - (letter in ")]")
        kept.append(letter if not depth else "_")
    return "".join(kept)
