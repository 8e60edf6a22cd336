"""A value that a plan could compute: the tree that the planner grows before one branch becomes the plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moe_export.einsum_rewrite.layout import Axis, Layout, arrange, flat
from moe_export.einsum_rewrite.prices import Prices
from moe_export.einsum_rewrite.steps import (
    Action,
    Diagonal,
    MatMul,
    Multiply,
    Step,
    Sum,
    diagonal_layout,
    matmul_layout,
    multiply_layout,
    sum_layout,
)


@dataclass(frozen=True, eq=False)
class Value:
    """An operand, or an action on other values, with the price of all that leads to it."""

    layout: Layout
    price: float = 0.0
    action: Action | None = None
    inputs: tuple[Value, ...] = ()
    operand: int = -1
    constant: bool = False

    @cached_property
    def labels(self) -> Axis:
        """The labels, in the order of the axes."""
        return flat(self.layout)

    def moved(self, goal: Layout, prices: Prices) -> Value:
        """The same value, arranged as `goal`."""
        value = self
        price = self.price + self.move_price(goal, prices)
        for move, layout in arrange(self.layout, goal):
            value = Value(layout, price, move, (value,), constant=self.constant)
        return value

    def move_price(self, goal: Layout, prices: Prices) -> float:
        """What `moved` costs. Constants are arranged once, when the engine is built."""
        return 0.0 if self.constant else prices.moves(self.layout, goal)

    def diagonal(self, first: int, second: int) -> Value:
        """The diagonal of two axes."""
        return self._after(Diagonal(first, second), diagonal_layout(self.layout, first, second))

    def sum(self, axes: tuple[int, ...], prices: Prices, *, alone: bool) -> Value:
        """The sum over some axes."""
        price = prices.sum(self.layout, axes) + (0.0 if alone else prices.excess(self.labels))
        return self._after(Sum(axes, alone), sum_layout(self.layout, axes), price)

    def multiply(self, other: Value, prices: Prices) -> Value:
        """The elementwise product."""
        layout = multiply_layout(self.layout, other.layout)
        price = prices.product(self.layout, other.layout, layout)
        return Value(layout, self.price + other.price + price, Multiply(), (self, other))

    def matmul(self, other: Value, prices: Prices) -> Value:
        """The matrix product."""
        layout = matmul_layout(self.layout, other.layout)
        price = prices.matmul(self.layout, other.layout, layout)
        return Value(layout, self.price + other.price + price, MatMul(), (self, other))

    def _after(self, action: Action, layout: Layout, price: float = 0.0) -> Value:
        return Value(layout, self.price + price, action, (self,), constant=self.constant)


def steps_to(value: Value, operands: int) -> tuple[tuple[Step, ...], int]:
    """The steps that compute `value`, in order, and the number of the value that is the result."""
    steps: list[Step] = []

    def visit(node: Value) -> int:
        if node.action is None:
            return node.operand
        inputs = tuple(visit(child) for child in node.inputs)
        steps.append(Step(node.action, inputs, node.layout))
        return operands + len(steps) - 1

    result = visit(value)
    return tuple(steps), result
