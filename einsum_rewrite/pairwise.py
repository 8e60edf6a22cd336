"""All sensible ways to combine two operands into one.

    B  labels in both, and kept            bnd,bnd->bn     B = b n, K = d
    K  labels in both, and summed          bld,dn->bln     M = b l, K = d, N = n
    M  labels of the left one alone        zi,zj->zij      B = z, M = i, N = j
    N  labels of the right one alone

K empty: unsqueeze and multiply.
M and N empty: multiply and sum. A matrix product would be one dot product after another, which takes ONNX
Runtime 5 to 30 times as long on a CPU.
M or N empty: multiply and sum makes nothing larger than the larger operand, so it competes with the matrix
product, which is 3 to 8 times as fast but may need more transposes.
None empty: only a matrix product will do. The outer product in between would be larger by a factor of K than
anything the caller asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from moe_export.einsum_rewrite.layout import UNIT, Axis, Layout, flat, plain
from moe_export.einsum_rewrite.orders import common_orders, suffixes
from moe_export.einsum_rewrite.prices import Prices
from moe_export.einsum_rewrite.value import Value

KEPT_CHOICES = 3
"""How many differently laid out versions of an intermediate are kept for the next step to choose from."""


class Form(NamedTuple):
    """A matrix product: `left` @ `right`, with the axes that they need."""

    batch: Axis
    left: Layout
    right: Layout
    result: Layout
    swapped: bool


class Choice(NamedTuple):
    """A priced way to combine two values; `order` is set for a product, `form` for a matrix product."""

    price: float
    order: Axis
    form: Form | None
    layout: Layout


def combine(x: Value, y: Value, keep: frozenset[str], goal: Axis | None, prices: Prices) -> list[Value]:
    """Combine two values, cheapest first.

    Args:
        x: A value without labels that could have been summed before.
        y: Another.
        keep: The labels that the result keeps; the others are summed.
        goal: The order of the labels of the result, None if any will do.
        prices: What a step costs.
    """
    summed = _summed(x, y, keep)
    choices = _choices(x, y, keep, goal, prices)
    best: dict[Layout, Choice] = {}
    for choice in choices:
        known = best.get(choice.layout)
        if known is None or choice.price < known.price:
            best[choice.layout] = choice
    cheapest = sorted(best.values(), key=lambda choice: choice.price)[:KEPT_CHOICES]
    return [_build(x, y, choice, summed, prices) for choice in cheapest]


def alternatives(x: Value, y: Value, keep: frozenset[str], goal: Axis | None, prices: Prices) -> list[Value]:
    """Every way that `combine` weighs, cheapest first, also those that it throws away."""
    choices = sorted(_choices(x, y, keep, goal, prices), key=lambda choice: choice.price)
    return [_build(x, y, choice, _summed(x, y, keep), prices) for choice in choices]


def _summed(x: Value, y: Value, keep: frozenset[str]) -> frozenset[str]:
    return frozenset(x.labels) & frozenset(y.labels) - keep


def _choices(x: Value, y: Value, keep: frozenset[str], goal: Axis | None, prices: Prices) -> list[Choice]:
    shared = frozenset(x.labels) & frozenset(y.labels)
    summed = shared - keep
    choices = []
    if not summed or shared >= frozenset(x.labels) or shared >= frozenset(y.labels):
        choices += [
            _price_product(x, y, order, summed, goal, prices) for order in _product_orders(x, y, goal)
        ]
    if summed and frozenset(x.labels) != frozenset(y.labels):
        choices += [
            _price_matmul(x, y, form, goal, prices)
            for form in matmul_forms(x.labels, y.labels, keep, goal, prices.target.vectors)
        ]
    return choices


def _build(x: Value, y: Value, choice: Choice, summed: frozenset[str], prices: Prices) -> Value:
    price = choice.price - x.price - y.price
    if choice.form is not None:
        left, right = (y, x) if choice.form.swapped else (x, y)
        value = left.moved(choice.form.left, prices).matmul(right.moved(choice.form.right, prices), price)
        return value.moved(choice.layout, prices)
    a, b = (v.moved(_aligned(v, choice.order, prices), prices) for v in (x, y))
    value = a.multiply(b, price)
    axes = tuple(i for i, axis in enumerate(value.layout) if axis and axis[0] in summed)
    if axes:
        value = value.sum(axes, alone=False)
    return value.moved(choice.layout, prices)


# --- products -----------------------------------------------------------------------------------------------


def _product_orders(x: Value, y: Value, goal: Axis | None) -> Iterable[Axis]:
    return common_orders((x.labels, y.labels) if goal is None else (x.labels, y.labels, goal))


def _price_product(
    x: Value, y: Value, order: Axis, summed: frozenset[str], goal: Axis | None, prices: Prices
) -> Choice:
    price = x.price + y.price + prices.target.node + prices.target.product * prices.elements(order)
    if summed:
        price += prices.target.node + prices.elements(order) + prices.excess(order)
    for value in (x, y):
        price += value.move_price(_aligned(value, order, prices), prices)
    result = plain(label for label in order if label not in summed)
    layout = result if goal is None else plain(goal)
    return Choice(price + prices.moves(result, layout), order, None, layout)


def _aligned(value: Value, order: Axis, prices: Prices) -> Layout:
    """The layout in which a value broadcasts to `order`: axes of size 1 where it lacks a label."""
    have = frozenset(value.labels)
    return _cheaper(value, tuple((label,) if label in have else UNIT for label in order), 0, prices)


def _cheaper(value: Value, full: Layout, fixed: int, prices: Prices) -> Layout:
    """Leading axes of size 1 can be left out; keep them only if the value has them already.

    The last `fixed` axes are never left out.
    """
    lead = 0
    while lead < len(full) - fixed and full[lead] == UNIT:
        lead += 1
    if not lead or len(value.layout) == len(full) - lead:
        return full[lead:]
    return min(full[lead:], full, key=lambda layout: prices.moves(value.layout, layout))


# --- matrix products ----------------------------------------------------------------------------------------


def _price_matmul(x: Value, y: Value, form: Form, goal: Axis | None, prices: Prices) -> Choice:
    left, right = (y, x) if form.swapped else (x, y)
    form = form._replace(
        left=_cheaper(left, form.left, min(2, len(form.left)), prices),
        right=_cheaper(right, form.right, min(2, len(form.right)), prices),
    )
    price = x.price + y.price + prices.target.node
    price += left.move_price(form.left, prices) + right.move_price(form.right, prices)
    price += prices.elements(frozenset(x.labels + y.labels)) * prices.target.flop + prices.elements(
        flat(form.result)
    )
    price += _price_broadcast(form, prices)
    if goal is not None:
        layout = plain(goal)
    elif any(len(axis) > 1 for axis in form.result):
        layout = plain(flat(form.result))
    else:
        layout = form.result
    return Choice(price + prices.moves(form.result, layout), (), form, layout)


def _price_broadcast(form: Form, prices: Prices) -> float:
    """What it costs that the product is many small ones, over which an operand may have to be repeated."""
    left, right = (frozenset(flat(side)) & frozenset(form.batch) for side in (form.left, form.right))
    if not left or not right:
        return 0.0  # engines fold the batch axes of one operand into its rows
    price = prices.target.batch * prices.elements(form.batch)
    for mine, side in ((left, form.left), (right, form.right)):
        missing = [label for label in form.batch if label not in mine]
        if missing:
            repeated = prices.elements(flat(side)) * prices.elements(missing)
            price += repeated * (2.0 if prices.target.copies else 0.25)
    return price


@lru_cache(maxsize=4096)
def matmul_forms(
    x: Axis, y: Axis, keep: frozenset[str], goal: Axis | None, vectors: bool
) -> tuple[Form, ...]:
    """The matrix products that combine labels `x` with labels `y`, with either one on the left.

    `vectors` says that a matrix product of a vector may be used.
    """
    forms = dict.fromkeys(_forms_one_way(x, y, keep, goal, swapped=False))
    forms |= dict.fromkeys(_forms_one_way(y, x, keep, goal, swapped=True))
    return tuple(form for form in forms if vectors or min(len(form.left), len(form.right)) > 1)


def _forms_one_way(
    x: Axis, y: Axis, keep: frozenset[str], goal: Axis | None, swapped: bool
) -> Iterator[Form]:
    summed = frozenset(x) & frozenset(y) - keep
    rows, columns = (_only(a, b) for a, b in ((x, y), (y, x)))
    for inner in dict.fromkeys((_pick(x, summed), _pick(y, summed))):
        for row in suffixes(rows, goal):
            for column in suffixes(columns, goal):
                batch = frozenset(x + y) - summed - frozenset(row) - frozenset(column)
                chains = [_pick(x, batch), _pick(y, batch)] + ([] if goal is None else [_pick(goal, batch)])
                for order in common_orders(tuple(chains)):
                    left = (*_with_units(order, x), row, inner)
                    right = (*_with_units(order, y), inner, column)
                    yield Form(order, left, right, (*plain(order), row, column), swapped)
        yield from _vector_forms(x, y, inner, summed, swapped)


def _vector_forms(x: Axis, y: Axis, inner: Axis, summed: frozenset[str], swapped: bool) -> Iterator[Form]:
    """A vector needs no axis of size 1 beside it."""
    if frozenset(y) == summed:
        batch = tuple(label for label in x if label not in summed)
        yield Form(batch, (*plain(batch), inner), (inner,), plain(batch), swapped)
    elif frozenset(x) == summed:
        *batch_labels, column = (label for label in y if label not in summed)
        result = plain((*batch_labels, column))
        yield Form(tuple(batch_labels), (inner,), (*plain(batch_labels), inner, (column,)), result, swapped)


def _only(labels: Axis, others: Axis) -> Axis:
    return tuple(label for label in labels if label not in others)


def _pick(labels: Axis, wanted: frozenset[str]) -> Axis:
    return tuple(label for label in labels if label in wanted)


def _with_units(order: Axis, labels: Axis) -> Layout:
    return tuple((label,) if label in labels else UNIT for label in order)
