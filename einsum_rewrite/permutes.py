"""What a permute costs, and the two fast ones that a slow one is made of.

ONNX Runtime's CPU moves one axis (or neighbours, as one) elsewhere, or rows as they are, at 0.3 to 1 ns an element; any
other permute takes 4.5 ns (1.31, measured: `abc->cba` of 4,096 elements and more, 3 to 10 times as long as in two
steps). Two are always enough: one puts the last axis where it goes, the other reorders the rest.

An order says for each axis of the result which axis of the operand it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod

from moe_export.einsum_rewrite.targets import Target

Order = tuple[int, ...]

APART = 3
"""Nodes more than one permute: another, and `Flatten` and `Reshape` to keep them from becoming one again."""


def composed(first: Order, second: Order) -> Order:
    """The order of a permute and another one after it.

    >>> composed((1, 2, 0), (0, 2, 1))
    (1, 0, 2)
    """
    return tuple(first[axis] for axis in second)


def inverse(order: Order) -> Order:
    """The order of the permute that undoes one."""
    return tuple(sorted(range(len(order)), key=lambda place: order[place]))


def permute_price(target: Target, order: Order, sizes: Sequence[float]) -> float:
    """The price of moving the elements; nothing for the node.

    Args:
        target: The engine.
        order: Of the permute.
        sizes: Of the operand.
    """
    count = prod(sizes)
    blocks = _blocks([axis for axis in order if sizes[axis] > 1])
    if order[:-2] == tuple(range(len(order) - 2)):
        return target.swap * count  # engines fuse a swap of the last two axes into a neighbouring matmul
    if blocks[-1:] == [len(blocks) - 1]:
        return target.rows * count
    return (target.move if _moves_one_axis(blocks) else target.scatter) * count


def is_fast(order: Order) -> bool:
    """Whether a permute is none that scatters, whatever the sizes are."""
    blocks = _blocks(order)
    return blocks[-1:] == [len(blocks) - 1] or _moves_one_axis(blocks)


@lru_cache(maxsize=4096)
def in_two(target: Target, order: Order, sizes: tuple[float, ...]) -> tuple[Order, Order] | None:
    """Two permutes that are cheaper than the one, kept apart; None if there are none."""
    if not target.splits:
        return None
    best, found = permute_price(target, order, sizes), None
    for move in _moves(len(order)):
        for first in (move, composed(order, inverse(move))):
            second = composed(inverse(first), order)
            price = price_of_two(target, first, second, sizes)
            if price < best:
                best, found = price, (first, second)
    return found


def price_of_two(target: Target, first: Order, second: Order, sizes: Sequence[float]) -> float:
    """The price of two permutes that are kept apart, beyond that of one node."""
    between = [sizes[axis] for axis in first]
    moved = permute_price(target, first, sizes) + permute_price(target, second, between)
    return moved + APART * target.node


def _moves(rank: int) -> Iterator[Order]:
    """All orders in which two neighbouring groups of axes change places."""
    for start in range(rank):
        for middle in range(start + 1, rank):
            for end in range(middle + 1, rank + 1):
                yield (*range(start), *range(middle, end), *range(start, middle), *range(end, rank))


def _blocks(order: Sequence[int]) -> list[int]:
    """A permutation of axes, with those that stay neighbours taken as one.

    >>> _blocks([2, 3, 0, 1])
    [1, 0]
    """
    firsts = [
        axis for place, axis in enumerate(order) if not place or not _follows(order[place - 1], axis, order)
    ]
    return [sorted(firsts).index(axis) for axis in firsts]


def _follows(before: int, axis: int, order: Sequence[int]) -> bool:
    return axis > before and not any(before < other < axis for other in order)


def _moves_one_axis(order: Sequence[int]) -> bool:
    """Whether taking one axis out leaves the others in their order."""
    return any(rest == sorted(rest) for rest in ([*order[:k], *order[k + 1 :]] for k in range(len(order))))
