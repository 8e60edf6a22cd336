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

from moe_export.einsum_rewrite.layout import UNIT, Axis, Layout, plain
from moe_export.einsum_rewrite.orders import common_orders, one_move_from, suffixes
from moe_export.einsum_rewrite.prices import Prices
from moe_export.einsum_rewrite.value import Value

KEPT_CHOICES = 3
"""How many differently laid out versions of an intermediate are kept for the next step to choose from."""


class Form(NamedTuple):
    """A matrix product: `left` @ `right`, with the axes that they need; `swapped` where the second value is left."""

    left: Layout
    right: Layout
    swapped: bool


def combine(x: Value, y: Value, keep: frozenset[str], goal: Axis | None, prices: Prices) -> list[Value]:
    """Combine two values, cheapest first.

    Args:
        x: A value without labels that could have been summed before.
        y: Another.
        keep: The labels that the result keeps; the others are summed.
        goal: The order of the labels of the result, None if any will do.
        prices: What a step costs.
    """
    best: dict[Layout, Value] = {}
    for value in alternatives(x, y, keep, goal, prices):
        best.setdefault(value.layout, value)
    return list(best.values())[:KEPT_CHOICES]


def alternatives(x: Value, y: Value, keep: frozenset[str], goal: Axis | None, prices: Prices) -> list[Value]:
    """Every way that `combine` weighs, cheapest first, also those that it throws away."""
    shared = frozenset(x.labels) & frozenset(y.labels)
    summed = shared - keep
    found: list[Value] = []
    if not summed or shared >= frozenset(x.labels) or shared >= frozenset(y.labels):
        found += [
            _product(x, y, order, summed, goal, prices) for order in _product_orders(x, y, goal, prices)
        ]
    if summed and frozenset(x.labels) != frozenset(y.labels):
        found += [
            _matmul(x, y, form, goal, prices)
            for form in matmul_forms(x.labels, y.labels, keep, goal, prices.target.vectors)
        ]
    return sorted(found, key=lambda value: value.price)


# --- products -----------------------------------------------------------------------------------------------


def _product_orders(x: Value, y: Value, goal: Axis | None, prices: Prices) -> Iterable[Axis]:
    if goal is None:
        return common_orders((x.labels, y.labels))
    orders = common_orders((x.labels, y.labels, goal))
    if prices.target.scatter > 2 * prices.target.move and len(orders[0]) == len(goal):
        return dict.fromkeys((*orders, *one_move_from(goal)))
    return orders


def _product(
    x: Value, y: Value, order: Axis, summed: frozenset[str], goal: Axis | None, prices: Prices
) -> Value:
    left, right = (value.moved(_aligned(value, order, prices), prices) for value in (x, y))
    value = left.multiply(right, prices)
    axes = tuple(i for i, axis in enumerate(value.layout) if axis and axis[0] in summed)
    if axes:
        value = value.sum(axes, prices, alone=False)
    return value.moved(plain(value.labels if goal is None else goal), prices)


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


def _matmul(x: Value, y: Value, form: Form, goal: Axis | None, prices: Prices) -> Value:
    left, right = (y, x) if form.swapped else (x, y)
    left = left.moved(_cheaper(left, form.left, min(2, len(form.left)), prices), prices)
    right = right.moved(_cheaper(right, form.right, min(2, len(form.right)), prices), prices)
    value = left.matmul(right, prices)
    if goal is not None:
        return value.moved(plain(goal), prices)
    folded = any(len(axis) > 1 for axis in value.layout)
    return value.moved(plain(value.labels), prices) if folded else value


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
                    yield Form(left, right, swapped)
        yield from _vector_forms(x, y, inner, summed, swapped)


def _vector_forms(x: Axis, y: Axis, inner: Axis, summed: frozenset[str], swapped: bool) -> Iterator[Form]:
    """A vector needs no axis of size 1 beside it."""
    if frozenset(y) == summed:
        batch = tuple(label for label in x if label not in summed)
        yield Form((*plain(batch), inner), (inner,), swapped)
    elif frozenset(x) == summed:
        *batch_labels, column = (label for label in y if label not in summed)
        yield Form((inner,), (*plain(batch_labels), inner, (column,)), swapped)


def _only(labels: Axis, others: Axis) -> Axis:
    return tuple(label for label in labels if label not in others)


def _pick(labels: Axis, wanted: frozenset[str]) -> Axis:
    return tuple(label for label in labels if label in wanted)


def _with_units(order: Axis, labels: Axis) -> Layout:
    return tuple((label,) if label in labels else UNIT for label in order)
