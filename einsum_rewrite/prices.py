"""What a step costs on a target, so that plans can be compared. Sizes that are not known are guessed, alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING

from moe_export.einsum_rewrite.binding import Size
from moe_export.einsum_rewrite.layout import UNIT, Layout, Move, Permute, Reshape, arrange, flat
from moe_export.einsum_rewrite.permutes import in_two, permute_price, price_of_two
from moe_export.einsum_rewrite.reshaping import lookups
from moe_export.einsum_rewrite.steps import Diagonal, MatMul, Multiply, Sum
from moe_export.einsum_rewrite.targets import Target

if TYPE_CHECKING:
    from moe_export.einsum_rewrite.plan import Plan

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

    def plan(self, plan: Plan) -> float:
        """The price of all steps of a plan; moves of constants count, too."""
        price = 0.0
        for step in plan.steps:
            action, inputs = step.action, [plan.layout(value) for value in step.inputs]
            if isinstance(action, Multiply):
                price += self.product(inputs[0], inputs[1], step.layout)
            elif isinstance(action, MatMul):
                price += self.matmul(inputs[0], inputs[1], step.layout)
            elif isinstance(action, Sum):
                price += self.sum(inputs[0], action.axes)
            elif not isinstance(action, Diagonal):  # every plan begins with the same ones
                price += self.move(action, inputs[0], step.layout)
        return price

    def product(self, left: Layout, right: Layout, result: Layout) -> float:
        """The price of an elementwise product, aligned from the right and broadcast."""
        engine, count = self.target, self.elements(flat(result))
        return engine.node + engine.product * count + engine.span * self._spans(left, right, result)

    def sum(self, layout: Layout, axes: Sequence[int]) -> float:
        """The price of a sum over some axes."""
        engine, last = self.target, [i for i, axis in enumerate(layout) if self.elements(axis) > 1][-1:]
        rows = all(i in axes for i in last)
        return engine.node + (engine.sum_rows if rows else engine.sum) * self.elements(flat(layout))

    def matmul(self, left: Layout, right: Layout, result: Layout) -> float:
        """The price of a matrix product: batch axes, then rows and columns."""
        engine = self.target
        batch = self.elements(frozenset(flat(left[:-2] + right[:-2])))
        rows = self.elements(left[-2]) if len(left) > 1 else 1.0
        columns = self.elements(right[-1]) if len(right) > 1 else 1.0
        inner = self.elements(left[-1])
        if not flat(right[:-2]):  # engines fold the batch axes of the left operand into its rows
            rows, batch = rows * batch, 1.0
        one = engine.batch + engine.read * inner * (rows + columns) + engine.flop * rows * inner * columns
        price = engine.node + batch * one + self.elements(flat(result))
        for side in (left, right):
            if engine.copies and 1 < self.elements(flat(side[:-2])) < batch:
                price += 2.0 * batch * self.elements(flat(side[-2:]))
        return price

    def _spans(self, left: Layout, right: Layout, result: Layout) -> float:
        """How many runs a broadcast is made of, in each of which an operand is read in order or is one element."""
        span, kind = 1.0, None
        for place in range(1, len(result) + 1):
            size = self.elements(result[-place])
            varies = tuple(place <= len(side) and side[-place] != UNIT for side in (left, right))
            if size > 1 and varies != kind and kind is not None:
                return self.elements(flat(result)) / span
            if size > 1:
                span, kind = span * size, varies
        return 1.0

    def _price_moves(self, start: Layout, goal: Layout) -> float:
        price = 0.0
        for move, layout in arrange(start, goal):
            price += self.move(move, start, layout)
            start = layout
        return price

    def move(self, move: Move, start: Layout, layout: Layout) -> float:
        """The price of one move from a layout to another."""
        if isinstance(move, Permute):
            return self.target.node + self.target.transpose + self._permute(start, move)
        looked_up = isinstance(move, Reshape) and not self.target.copies
        return self.target.node * (1 + (lookups(start, layout, self._sizes) if looked_up else 0))

    def _permute(self, start: Layout, move: Permute) -> float:
        """The price of a permute, or of the two that are written in its place."""
        engine, sizes = self.target, tuple(map(self.elements, start))
        two = in_two(engine, move.order, sizes)
        return permute_price(engine, move.order, sizes) if two is None else price_of_two(engine, *two, sizes)
