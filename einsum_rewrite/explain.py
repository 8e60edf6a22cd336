"""Why a plan was chosen: what else was weighed, what people write by hand, and what each of them costs.

bnd,bnd->bn on onnxruntime-cpu
plans                                FLOPs      moved     largest
* multiply, sum                      ...
by hand
repeat to (b, n, d), multiply, sum
(x.unsqueeze(-2) @ y.unsqueeze(-1)).squeeze(-1).squeeze(-1)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_export.einsum_rewrite.amount import Amount, show_bytes
from moe_export.einsum_rewrite.binding import Shape
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.layout import Axis, flat
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.planner import candidates, make_plan
from moe_export.einsum_rewrite.steps import MatMul

SHOWN = 6
"""The cheapest plans that are shown; the others differ in where they transpose."""


@dataclass(frozen=True)
class Row:
    """One way to compute an equation.

    Attributes:
        how: The steps, or what people write.
        flops: Multiplications and additions.
        moved: Elements read and written by passes over memory.
        largest: Elements of the largest value that is made.
        chosen: Whether this is the plan.
    """

    how: str
    flops: Amount
    moved: Amount
    largest: Amount
    chosen: bool = False


@dataclass(frozen=True)
class Explanation:
    """All that `moe-export rewrite EQUATION` says about the choice."""

    plan: Plan
    target: str
    weighed: tuple[Row, ...]
    others: int
    by_hand: tuple[Row, ...]
    why: str

    def __str__(self) -> str:
        rows = [*self.weighed, *self.by_hand]
        wide = max(len(row.how) for row in rows) + 2
        heads = ("FLOPs", "bytes moved", "largest value (float32)")
        cells = [(f"{row.flops}", show_bytes(row.moved, 4), show_bytes(row.largest, 4)) for row in rows]
        widths = [max(len(cell[i]) for cell in [*cells, heads]) for i in range(3)]
        lines = [
            f"  {'* ' if row.chosen else '  '}{row.how:<{wide}}"
            + "  ".join(f"{text:>{width}}" for text, width in zip(cell, widths, strict=True))
            for row, cell in zip(rows, cells, strict=True)
        ]
        head = "  ".join(f"{text:>{width}}" for text, width in zip(heads, widths, strict=True))
        count = len(self.weighed)
        more = [f"    ... and {self.others} dearer ones"] if self.others else []
        hand = ["by hand", *lines[count:]] if self.by_hand else []
        return "\n".join([f"{'plans':<{wide + 4}}{head}", *lines[:count], *more, *hand, f"why: {self.why}"])


def explain(equation: Equation, shapes: Sequence[Shape], target: str = "onnx") -> Explanation:
    """Weigh the plans of an equation again, and tell what was found.

    Args:
        equation: What to compute.
        shapes: The shape of each operand; names or None where a size is not known.
        target: The engine to plan for.
    """
    plan = make_plan(equation, shapes, target=target)
    priced = candidates(equation, shapes, target)
    rest = [(price, other) for price, other in priced if other.steps != plan.steps]
    rows = [_row(plan, chosen=True)]
    for _, other in rest:
        row = _row(other)
        if all((row.how, row.flops, row.moved) != (seen.how, seen.flops, seen.moved) for seen in rows):
            rows.append(row)
    own = next((price for price, other in priced if other.steps == plan.steps), None)
    return Explanation(
        plan,
        target,
        tuple(rows[:SHOWN]),
        max(0, len(rows) - SHOWN),
        tuple(_by_hand(plan)),
        _why(plan, own, rest),
    )


def _row(plan: Plan, chosen: bool = False) -> Row:
    return Row(plan.summary, plan.flops, plan.moved, plan.largest, chosen)


def _why(plan: Plan, own: float | None, rest: Sequence[tuple[float, Plan]]) -> str:
    summed = {label for layout in plan.operands for axis in layout for label in axis} - set(plan.output)
    products = [step for step in plan.steps if isinstance(step.action, MatMul)]
    if len(plan.operands) == 1:
        return "there is one operand, and nothing to multiply"
    if not summed:
        reason = (
            "nothing is summed, so a product is all there is; a matrix product would sum over an axis of 1"
        )
    elif products:
        reason = "a matrix product sums as it multiplies; a product first would be larger by what is summed"
    else:
        reason = (
            "no axis is free for a matrix product to gain from; it would be one dot product after another"
        )
    if own is None or not rest or not own:
        return reason
    least = min(price for price, _ in rest)
    if least < own * 1.005:
        return f"{reason}; others cost the same"
    more = f"{least / own - 1:.0%} more" if least < 2 * own else f"{least / own:.0f} times as much"
    return f"{reason}; the next plan costs {more}"


# --- what people write by hand ------------------------------------------------------------------------------


def _by_hand(plan: Plan) -> Iterator[Row]:
    """The alternatives that are seen in models, where they apply to two operands without diagonals."""
    labels = [flat(layout) for layout in plan.operands]
    if len(labels) != 2 or any(len(set(axes)) < len(axes) for axes in labels):
        return
    x, y = labels
    everything = (*plan.output, *(label for label in dict.fromkeys(x + y) if label not in plan.output))
    if set(x) != set(everything) or set(y) != set(everything):
        yield _repeated(plan, x, y, everything)
    if len(everything) > len(plan.output):
        yield _outer(plan, x, y, everything)
        yield from _thin_matmul(plan, x, y)


def _elements(plan: Plan, labels: Axis) -> Amount:
    return Amount.product(labels, plan.sizes)


def _repeated(plan: Plan, x: Axis, y: Axis, everything: Axis) -> Row:
    """Both operands are repeated in memory until they have the same shape."""
    full = _elements(plan, everything)
    short = [axes for axes in (x, y) if set(axes) != set(everything)]
    moved = full + full + full
    for axes in short:
        moved = moved + _elements(plan, axes) + full
    flops, how = full, f"repeat_interleave to ({', '.join(everything)}), multiply"
    if len(everything) > len(plan.output):
        flops, how, moved = flops + full, f"{how}, sum", moved + full + _elements(plan, plan.output)
    return Row(how, flops, moved, full)


def _outer(plan: Plan, x: Axis, y: Axis, everything: Axis) -> Row:
    """Everything is multiplied with everything, and summed afterwards."""
    full, result = _elements(plan, everything), _elements(plan, plan.output)
    moved = _elements(plan, x) + _elements(plan, y) + full + full + result
    return Row("unsqueeze both, multiply, sum", full + full, moved, full)


def _thin_matmul(plan: Plan, x: Axis, y: Axis) -> Iterator[Row]:
    """`matmul(C, x.transpose(-1, -2)).squeeze(1)`: a matrix product with a row or a column of one."""
    free = [set(a) - set(b) for a, b in ((x, y), (y, x))]
    if all(free):
        return
    full, result = _elements(plan, tuple(dict.fromkeys(x + y))), _elements(plan, plan.output)
    how = (
        "matmul(y, x.transpose(-1, -2)).squeeze(1)" if any(free) else "matmul(x[..., None, :], y[..., None])"
    )
    moved = _elements(plan, x) + _elements(plan, y) + result
    largest = max((_elements(plan, x), result), key=lambda amount: amount.at({}, 32))
    yield Row(how, full + full, moved, largest)
