"""What plans cost: one price for a plan however it was found, and what makes a permute dear."""

from __future__ import annotations

import random
from itertools import permutations

import numpy as np
import pytest

from moe_export.einsum_rewrite.binding import bind
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.layout import Permute, plain
from moe_export.einsum_rewrite.planner import candidates
from moe_export.einsum_rewrite.prices import Prices
from moe_export.einsum_rewrite.targets import Target, read_target

ENGINE = "onnxruntime-cpu"
MOVES = Target("moves", node=0, transpose=0, swap=1, rows=10, move=100, scatter=1000)


def priced(order: tuple[int, ...], sizes: tuple[int, ...]) -> float:
    """What a permute costs, an element."""
    labels = "abcdef"[: len(order)]
    prices = Prices(dict(zip(labels, sizes, strict=True)), {}, MOVES)
    start = plain(labels)
    return prices.move(Permute(order), start, tuple(start[i] for i in order)) / np.prod(sizes)


@pytest.mark.parametrize(
    ("order", "sizes", "price"),
    [
        ((0, 2, 1), (3, 4, 5), 1),
        ((1, 0, 2), (3, 4, 5), 10),
        ((2, 0, 1), (3, 4, 5), 100),
        ((1, 2, 0), (3, 4, 5), 100),
        ((2, 3, 0, 1), (3, 4, 5, 6), 100),  # neighbours that stay together are one axis
        ((0, 3, 1, 2), (3, 4, 5, 6), 100),
        ((2, 1, 0), (3, 4, 5), 1000),
        ((2, 1, 0), (3, 1, 5), 100),  # an axis of size 1 is nowhere
        ((2, 1, 0), (3, 4, 1), 100),
        ((1, 0, 3, 2), (3, 4, 5, 6), 1000),
    ],
)
def test_a_permute_is_priced_by_what_it_does_to_rows(
    order: tuple[int, ...], sizes: tuple[int, ...], price: float
) -> None:
    assert priced(order, sizes) == price


def test_one_axis_moves_where_taking_it_out_and_putting_it_elsewhere_does_it() -> None:
    """Against every way to do so, over all permutations of five axes."""

    def merged(order: tuple[int, ...]) -> bool:
        return any(
            (*rest[:to], *block, *rest[to:]) == order
            for start in range(5)
            for end in range(start + 1, 6)
            for block, rest in [(tuple(range(start, end)), (*range(start), *range(end, 5)))]
            for to in range(len(rest) + 1)
        )

    for order in permutations(range(5)):
        price = priced(order, (2, 3, 4, 5, 6))
        if order[:3] != (0, 1, 2):
            expected = 10 if order[-1] == 4 else 100 if merged(order) else 1000
            assert price == expected, order


@pytest.mark.parametrize("engine", [ENGINE, "torch", "tensorrt"])
def test_a_plan_costs_what_its_steps_cost(engine: str) -> None:
    draw = random.Random(5)
    weighed = 0
    for _ in range(60):
        labels = "abcde"[: draw.randint(2, 5)]
        terms = [
            "".join(draw.sample(labels, draw.randint(1, len(labels)))) for _ in range(draw.randint(2, 3))
        ]
        used = sorted(set("".join(terms)))
        kept = "".join(draw.sample(used, draw.randint(0, len(used))))
        equation = Equation.parse(f"{','.join(terms)}->{kept}", "torch")
        shapes = [tuple(2 + ord(label) - ord("a") for label in term) for term in terms]
        prices = Prices(dict(bind(equation, shapes).sizes), {}, read_target(engine))
        for price, plan in candidates(equation, shapes, engine):
            assert price == pytest.approx(prices.plan(plan)), plan
            weighed += 1
    assert weighed > 300


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("abc,bcd->cda", ((128, 128, 32), (128, 32, 32))),
        ("ab,cdb->adc", ((128, 128), (128, 32, 128))),
        ("ac,bca->bc", ((64, 256), (64, 256, 64))),
    ],
)
def test_no_permute_scatters_where_another_plan_does_without(
    text: str, shapes: tuple[tuple[int, ...], ...]
) -> None:
    """They took 2 to 20 times as long as the plans that are chosen now."""
    equation = Equation.parse(text, "torch")
    (_, plan), *_ = candidates(equation, shapes, ENGINE)
    prices = Prices(dict(bind(equation, shapes).sizes), {}, MOVES)
    for step in plan.steps:
        if isinstance(step.action, Permute):
            elements = np.prod([prices.elements(axis) for axis in step.layout])
            assert prices.move(step.action, plan.layout(step.inputs[0]), step.layout) <= 100 * elements
