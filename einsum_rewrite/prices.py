"""What a step costs on a target, so that plans can be compared. Sizes that are not known are guessed, alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf

from moe_export.einsum_rewrite.binding import Size
from moe_export.einsum_rewrite.layout import Layout, Permute, Reshape, arrange, flat
from moe_export.einsum_rewrite.reshaping import lookups
from moe_export.einsum_rewrite.targets import Target

GUESS = 32
"""The size of a label of which nothing is known."""


EXCESS = 1e9
"""The price of an element of an intermediate that is larger than the user allows."""


class Prices:
    """Prices for one equation and its sizes.

    Args:
        sizes: The size of each label.
        guesses: Likely sizes, by the name of a symbolic size.
        target: The engine, with the cost of its steps.
        limit: The most elements that an intermediate value should have.
    """

    def __init__(
        self, sizes: Mapping[str, Size], guesses: Mapping[str, int], target: Target, limit: float = inf
    ) -> None:
        self._sizes = sizes
        self._likely: dict[str, float] = {}
        for label, size in sizes.items():
            # A traced example is often tiny; that says nothing about the sizes that will matter.
            likely = size if isinstance(size, int) else max(GUESS, guesses.get(size or label, GUESS))
            self._likely[label] = float(max(likely, 1))
        self.target = target
        self._limit = limit
        self._moves: dict[tuple[Layout, Layout], float] = {}

    def elements(self, labels: Iterable[str]) -> float:
        """How many elements a tensor with these labels has."""
        count = 1.0
        for label in labels:
            count *= self._likely[label]
        return count

    def excess(self, labels: Iterable[str]) -> float:
        """What it costs to make an intermediate that is larger than allowed: more than any step."""
        count = self.elements(labels)
        return EXCESS * count if count > self._limit else 0.0

    def moves(self, start: Layout, goal: Layout) -> float:
        """The price of `arrange(start, goal)`."""
        if start == goal:
            return 0.0
        key = (start, goal)
        if key not in self._moves:
            self._moves[key] = self._price_moves(start, goal)
        return self._moves[key]

    def _price_moves(self, start: Layout, goal: Layout) -> float:
        price = 0.0
        for move, layout in arrange(start, goal):
            price += self.target.node
            if isinstance(move, Permute):
                # Engines fuse a swap of the last two axes into a neighbouring matmul.
                swap = move.order[:-2] == tuple(range(len(move.order) - 2))
                price += self.target.transpose + self.elements(flat(start)) * (1.5 if swap else 2.0)
            elif isinstance(move, Reshape) and not self.target.copies:
                price += self.target.node * lookups(start, layout, self._sizes)
            start = layout
        return price
