"""In which order three and more operands are combined.

Up to `EXACT` operands every order is weighed, outer products ("multiply first") among them, by the work of
each step and the size of each intermediate. Beyond that opt_einsum's search decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_export.einsum_rewrite.prices import Prices

EXACT = 6
"""Weighing every order of n operands looks at 3**n pairs of subsets: 729 at 6."""

Tree = int | tuple[Any, Any]
"""An operand, or a pair of trees that are combined."""


def contraction_tree(terms: Sequence[frozenset[str]], output: frozenset[str], prices: Prices) -> Tree:
    """The order of the cheapest contraction of operands with these labels."""
    if len(terms) > EXACT:
        return _by_opt_einsum(terms, output, prices)
    if len(terms) <= 2:
        return (0, 1) if len(terms) == 2 else 0
    return _by_weighing(terms, output, prices)


def alive(
    inside: frozenset[str], outside: Sequence[frozenset[str]], output: frozenset[str]
) -> frozenset[str]:
    """The labels that something outside a group of operands still needs."""
    return inside & output.union(*outside)


def trees(operands: tuple[int, ...]) -> list[Tree]:
    """Every order in which operands can be combined two by two: 1, 3, 15, 105, ... for 2, 3, 4, 5."""
    if len(operands) == 1:
        return [operands[0]]
    found: list[Tree] = []
    first, rest = operands[0], operands[1:]
    for chosen in range(2 ** len(rest) - 1):
        left = (first, *(k for i, k in enumerate(rest) if chosen >> i & 1))
        right = tuple(k for i, k in enumerate(rest) if not chosen >> i & 1)
        found += [(a, b) for a in trees(left) for b in trees(right)]
    return found


def _by_weighing(terms: Sequence[frozenset[str]], output: frozenset[str], prices: Prices) -> Tree:
    count = len(terms)
    everything = 2**count - 1
    labels: dict[int, frozenset[str]] = {}
    for group in range(1, everything + 1):
        inside = [terms[i] for i in range(count) if group >> i & 1]
        outside = [terms[i] for i in range(count) if not group >> i & 1]
        labels[group] = alive(frozenset().union(*inside), outside, output)
    best: dict[int, tuple[float, Tree]] = {1 << i: (0.0, i) for i in range(count)}
    for group in sorted(range(1, everything + 1), key=int.bit_count):
        if group in best:
            continue
        part = (group - 1) & group
        while part > group ^ part:  # each pair of halves once
            rest = group ^ part
            price = best[part][0] + best[rest][0] + _price(labels[part], labels[rest], labels[group], prices)
            if group != everything:
                price += prices.excess(labels[group])
            if group not in best or price < best[group][0]:
                first, second = sorted((part, rest), key=lambda half: half & -half)
                best[group] = (price, (best[first][1], best[second][1]))
            part = (part - 1) & group
    return best[everything][1]


def _price(left: frozenset[str], right: frozenset[str], result: frozenset[str], prices: Prices) -> float:
    """A matrix product works once per element of K·M·N, at a discount; all else is a pass over memory."""
    union = left | right
    work = prices.elements(union)
    matmul = union != result and not (left <= right or right <= left)
    return work * (prices.target.flop if matmul else 1.0) + prices.elements(result)


def _by_opt_einsum(terms: Sequence[frozenset[str]], output: frozenset[str], prices: Prices) -> Tree:
    import opt_einsum

    sizes = {label: int(prices.elements((label,))) for term in terms for label in term}
    path = opt_einsum.paths.greedy([set(term) for term in terms], set(output), sizes)
    trees: list[Tree] = list(range(len(terms)))
    for positions in path:
        taken = [trees[i] for i in positions]
        trees = [tree for i, tree in enumerate(trees) if i not in positions]
        group = taken[0]
        for tree in taken[1:]:
            group = (group, tree)
        trees.append(group)
    joined: Tree = trees[0]
    for tree in trees[1:]:
        joined = (joined, tree)
    return joined
