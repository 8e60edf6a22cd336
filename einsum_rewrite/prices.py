"""What a step costs, so that plans can be compared.

The unit is the time to move one element through memory. Numbers are rough on purpose: they rank plans of one
equation, they predict nothing. Sizes that are not known are guessed, all alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moe_export.einsum_rewrite.binding import Size
from moe_export.einsum_rewrite.layout import Layout, Permute, Reshape, arrange, flat

GUESS = 32
"""The size of a label of which nothing is known."""

NODE = 400.0
"""A step that computes nothing: the engine still walks over it."""

TRANSPOSE = 4000.0
"""A permute on top of its moves: it also keeps its neighbours from being fused."""

SHAPE_CHAIN = 3 * NODE
"""A size that a reshape must look up at run time, since only one may be left open (`-1`)."""

BATCH = 64.0
"""Starting one small matrix product among many."""

FLOP = 0.05
"""A multiply-add inside a matrix product, which is far cheaper than a pass over memory."""


class Prices:
    """Prices for one equation and its sizes.

    Args:
        sizes: The size of each label.
        guesses: Likely sizes, by the name of a symbolic size.
        copies: Whether the target copies an operand that a matmul broadcasts along some of its batch axes.
            Torch does, and reads sizes for nothing; engines for ONNX follow strides, and pay for each size
            that a reshape looks up.
    """

    def __init__(self, sizes: Mapping[str, Size], guesses: Mapping[str, int], *, copies: bool) -> None:
        self._sizes = sizes
        self._likely: dict[str, float] = {}
        for label, size in sizes.items():
            # A traced example is often tiny; that says nothing about the sizes that will matter.
            likely = size if isinstance(size, int) else max(GUESS, guesses.get(size or label, GUESS))
            self._likely[label] = float(max(likely, 1))
        self.copies = copies
        self._moves: dict[tuple[Layout, Layout], float] = {}

    def elements(self, labels: Iterable[str]) -> float:
        """How many elements a tensor with these labels has."""
        count = 1.0
        for label in labels:
            count *= self._likely[label]
        return count

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
            price += NODE
            if isinstance(move, Permute):
                # Engines fuse a swap of the last two axes into a neighbouring matmul.
                swap = move.order[:-2] == tuple(range(len(move.order) - 2))
                price += TRANSPOSE + self.elements(flat(start)) * (1.5 if swap else 2.0)
            elif isinstance(move, Reshape) and not self.copies:
                price += SHAPE_CHAIN * max(0, self._open_sizes(start, layout) - 1)
            start = layout
        return price

    def _open_sizes(self, start: Layout, goal: Layout) -> int:
        """Axes whose size is neither known nor copied from the axis at the same place."""
        return sum(
            any(not isinstance(self._sizes[label], int) for label in axis)
            for i, axis in enumerate(goal)
            if i >= len(start) or start[i] != axis
        )
