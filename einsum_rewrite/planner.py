"""From an equation and shapes to a `Plan`.

1. Take diagonals; sum labels that only one operand has and the result does not keep.
2. Choose the order in which the operands are combined (`contraction`).
3. Choose how each pair is combined (`pairwise`); a few layouts of each intermediate are kept for the next.
4. Write the cheapest tree down as steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import inf

from moe_export.einsum_rewrite.amount import Amount
from moe_export.einsum_rewrite.binding import Binding, Shape, Size, bind, symbolic_shapes
from moe_export.einsum_rewrite.contraction import Tree, alive, contraction_tree, trees
from moe_export.einsum_rewrite.equation import Equation, read_notation
from moe_export.einsum_rewrite.layout import UNIT, Axis, Layout, flat, plain, show_layout
from moe_export.einsum_rewrite.notation import deduce
from moe_export.einsum_rewrite.pairwise import KEPT_CHOICES, alternatives, combine
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.prices import Prices
from moe_export.einsum_rewrite.steps import Step
from moe_export.einsum_rewrite.targets import Target, read_target
from moe_export.einsum_rewrite.value import Value, steps_to
from moe_export.errors import EquationError


def plan_einsum(
    equation: str | Equation, *shapes: Shape, notation: str | None = None, target: str = "onnx"
) -> Plan:
    """Plan an einsum without an `Einsum` operator.

    Args:
        equation: In torch's or einops' notation, or parsed already.
        shapes: The shape of each operand, a name or None where a size is not known. Without shapes every size
            is symbolic (and an ellipsis stands for no axes).
        notation: "torch" or "einops"; None deduces it (the rule is in `notation.deduce`).
        target: The engine to plan for (see `targets`); "onnx" for any that reads ONNX.

    Returns:
        A plan; print it to see steps, FLOPs and the largest intermediate.

    Example:
        >>> print(plan_einsum("b l d_in, d_in n -> b l d_in n").summary)
        unsqueeze, multiply
    """
    if isinstance(equation, str):
        ranks = [len(shape) for shape in shapes] if shapes else None
        chosen = deduce(equation, ranks) if notation is None else read_notation(notation)
        equation = Equation.parse(equation, chosen)
    return make_plan(equation, shapes or symbolic_shapes(equation), target=target)


def make_plan(
    equation: Equation,
    shapes: Sequence[Shape],
    *,
    guesses: Mapping[str, int] | None = None,
    constants: Sequence[int] = (),
    target: str = "onnx",
    limit: int | None = None,
) -> Plan:
    """Plan a parsed equation; the same question is answered from a cache.

    Args:
        equation: What to compute.
        shapes: The shape of each operand.
        guesses: Likely values of symbolic sizes, by name; they guide, and nothing depends on them.
        constants: Operands that never change, so that rearranging them costs nothing when the model runs.
        target: See `plan_einsum`.
        limit: The most elements that an intermediate value may have; sizes that are not known are guessed.

    Raises:
        EquationError: The shapes do not fit, or no plan keeps within the limit.
    """
    engine = read_target(target)
    frozen = tuple(tuple(shape) for shape in shapes)
    likely = tuple(sorted((guesses or {}).items()))
    return _plan(equation, frozen, likely, tuple(sorted(constants)), engine, limit)


@lru_cache(maxsize=4096)
def _plan(
    equation: Equation,
    shapes: tuple[tuple[Size, ...], ...],
    guesses: tuple[tuple[str, int], ...],
    constants: tuple[int, ...],
    target: Target,
    limit: int | None,
) -> Plan:
    binding = bind(equation, shapes)
    prices = Prices(dict(binding.sizes), dict(guesses), target, inf if limit is None else limit)
    operands = [_operand(binding, k, prices, k in constants) for k in range(len(shapes))]
    tree = contraction_tree(
        [frozenset(value.labels) for value in operands], frozenset(binding.output), prices
    )
    plan = to_plan(equation, binding, grow(tree, operands, binding.output, prices)[0], prices)
    if limit is not None:
        _refuse_excess(plan, limit, prices)
    return plan


def candidates(equation: Equation, shapes: Sequence[Shape], target: str = "onnx") -> list[tuple[float, Plan]]:
    """The plans that were weighed, each with its price, cheapest first; the first is the one that is chosen.

    Of up to 4 operands every order of combining them is tried, of more only the chosen one.
    """
    binding = bind(equation, shapes)
    prices = Prices(dict(binding.sizes), {}, read_target(target))
    operands = [_operand(binding, k, prices) for k in range(len(shapes))]
    goal = binding.output
    found: dict[tuple[Step, ...], tuple[float, Plan]] = {}
    for tree in (
        trees(tuple(range(len(operands))))
        if len(operands) <= 4
        else [contraction_tree([frozenset(value.labels) for value in operands], frozenset(goal), prices)]
    ):
        for value in grow(tree, operands, goal, prices, alternatives):
            plan = to_plan(equation, binding, value, prices)
            price = value.price + value.move_price(plain(goal), prices)
            if plan.steps not in found or price < found[plan.steps][0]:
                found[plan.steps] = (price, plan)
    return sorted(found.values(), key=lambda priced: priced[0])


def to_plan(equation: Equation, binding: Binding, value: Value, prices: Prices) -> Plan:
    """The plan that computes a value, arranged as the equation wants it."""
    steps, last = steps_to(value.moved(plain(binding.output), prices), len(binding.axes))
    return Plan(equation, tuple(map(_layout, binding.axes)), binding.output, binding.sizes, steps, last)


def _refuse_excess(plan: Plan, limit: int, prices: Prices) -> None:
    """The result must be made however large it is; what is made on the way must keep within the limit."""
    for step in plan.steps[:-1]:
        if prices.elements(flat(step.layout)) > max(limit, prices.elements(plan.output)):
            raise EquationError(
                f"every plan has an intermediate of more than {limit:,} elements; the best makes "
                f"({show_layout(step.layout)}), {Amount.product(flat(step.layout), plan.sizes)} elements",
                where=f"{plan.equation.text} ({plan.summary})",
                hint="allow more, or split the operands",
            )


Combine = Callable[[Value, Value, frozenset[str], Axis | None, Prices], list[Value]]


def grow(
    tree: Tree, operands: list[Value], goal: Axis, prices: Prices, last: Combine = combine
) -> list[Value]:
    """The cheapest values that a tree of operands can be; `last` is how the final pair is combined."""
    if isinstance(tree, int):
        return [operands[tree]]
    return _grow(tree, operands, goal, prices, last, whole=True)


def _grow(
    tree: Tree, operands: list[Value], goal: Axis, prices: Prices, last: Combine, *, whole: bool
) -> list[Value]:
    """Values in several layouts, unless they are the whole, which must have the layout of the goal."""
    if isinstance(tree, int):
        return [operands[tree]]
    left, right = tree
    inside = _leaves(tree)
    outside = [frozenset(value.labels) for k, value in enumerate(operands) if k not in inside]
    lefts = _grow(left, operands, goal, prices, last, whole=False)
    rights = _grow(right, operands, goal, prices, last, whole=False)
    keep = alive(frozenset(lefts[0].labels + rights[0].labels), outside, frozenset(goal))
    how, order = (last, goal) if whole else (combine, None)
    found = [value for x in lefts for y in rights for value in how(x, y, keep, order, prices)]
    return sorted(found, key=lambda value: value.price)[: None if how is alternatives else KEPT_CHOICES]


def _leaves(tree: Tree) -> frozenset[int]:
    return frozenset((tree,)) if isinstance(tree, int) else _leaves(tree[0]) | _leaves(tree[1])


def _layout(axes: Sequence[str | None]) -> Layout:
    return tuple(UNIT if label is None else (label,) for label in axes)


def _operand(binding: Binding, number: int, prices: Prices, constant: bool = False) -> Value:
    """An operand after its diagonals, and after the sums that concern it alone."""
    value = Value(_layout(binding.axes[number]), operand=number, constant=constant)
    for label, times in Counter(value.labels).items():
        for _ in range(times - 1):
            first, second = [i for i, axis in enumerate(value.layout) if axis == (label,)][:2]
            value = value.diagonal(first, second)
    elsewhere = {label for k, axes in enumerate(binding.axes) if k != number for label in axes}
    needed = elsewhere | set(binding.output)
    private = tuple(i for i, axis in enumerate(value.layout) if axis and axis[0] not in needed)
    return value.sum(private, prices, alone=True) if private else value
