"""Orders in which the labels of several tensors can lie so that few of them must be permuted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from moe_export.einsum_rewrite.layout import Axis

MANY = 4
"""Above this many labels only the longest and the shortest suffix are tried."""


@lru_cache(maxsize=8192)
def common_orders(chains: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Orders of all labels that keep the order within as many of the chains as can be.

    Every subset of the chains is merged; subsets that contradict themselves (`ab` and `ba`) yield nothing.
    An order that keeps every chain makes the others pointless, so then it is the only one.
    """
    found: dict[Axis, None] = {}
    for kept in _subsets(len(chains)):
        order = _merge([chains[i] for i in kept], [chains[i] for i in range(len(chains)) if i not in kept])
        if order is not None:
            found[order] = None
            if len(kept) == len(chains):
                break
    return tuple(found)


@lru_cache(maxsize=8192)
def one_move_from(goal: Axis) -> tuple[Axis, ...]:
    """The orders from which moving one label leads to `goal`: a product halfway between two permutes."""
    found: dict[Axis, None] = {}
    if len(goal) <= MANY + 1:
        for place, label in enumerate(goal):
            rest = goal[:place] + goal[place + 1 :]
            found |= dict.fromkeys((*rest[:k], label, *rest[k:]) for k in range(len(goal)))
    return tuple(found)


def suffixes(labels: Axis, goal: Axis | None) -> tuple[Axis, ...]:
    """The label groups that may form one side of a matrix: ends of `labels`, in their order or the goal's."""
    if not labels:
        return ((),)
    sources = [labels]
    if goal is not None:
        sources.append(tuple(label for label in goal if label in labels))
    found: dict[Axis, None] = {}
    for source in sources:
        starts = range(len(source)) if len(source) < MANY else (0, len(source) - 1)
        found |= dict.fromkeys(source[start:] for start in starts)
    return tuple(found)


def _subsets(count: int) -> list[tuple[int, ...]]:
    masks = sorted(range(1, 2**count), key=lambda mask: -mask.bit_count())
    return [tuple(i for i in range(count) if mask >> i & 1) for mask in masks]


def _merge(chains: Sequence[Axis], others: Sequence[Axis]) -> Axis | None:
    """The labels of all chains in an order that respects `chains`; None if there is none.

    Where the chains leave a choice, the order of first mention decides, the last chain (the goal) first.
    """
    mentions = dict.fromkeys(label for chain in (*reversed(chains), *reversed(others)) for label in chain)
    queues = [list(chain) for chain in chains]
    waiting = list(mentions)
    order: list[str] = []
    while waiting:
        for label in waiting:
            if all(label not in queue or queue[0] == label for queue in queues):
                break
        else:
            return None
        waiting.remove(label)
        order.append(label)
        for queue in queues:
            if queue and queue[0] == label:
                queue.pop(0)
    return tuple(order)
