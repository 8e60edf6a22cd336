"""Random equations and shapes against an independent evaluation, and against torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moe_export.einsum_rewrite import Equation, einsum, to_python
from moe_export.einsum_rewrite.planner import make_plan
from moe_export.einsum_rewrite.torch_ops import run

LETTERS = "abcdEF"
LARGEST_SPACE = 30_000


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, list[list[int]]]:
    """An equation in torch's letters, and shapes that fit it."""
    sizes = {letter: draw(st.sampled_from([0, 1, 2, 2, 3, 3, 5])) for letter in LETTERS}
    dots = draw(st.lists(st.sampled_from([0, 1, 2, 3]), max_size=2))
    terms, shapes = [], []
    for _ in range(draw(st.integers(1, 4))):
        letters = draw(st.lists(st.sampled_from(LETTERS), max_size=4))
        narrow = draw(st.sets(st.sampled_from(LETTERS), max_size=1))  # broadcast from 1 in this operand
        shape = [1 if letter in narrow else sizes[letter] for letter in letters]
        if draw(st.booleans()):
            place = draw(st.integers(0, len(letters)))
            rank = draw(st.integers(0, len(dots)))
            axes = [draw(st.sampled_from([1, size])) for size in dots[len(dots) - rank :]]
            letters.insert(place, "...")
            shape[place:place] = axes
        terms.append("".join(letters))
        shapes.append(shape)
    text = ",".join(terms)
    if draw(st.booleans()):
        known = sorted({label for term in terms for label in term.replace("...", "")})
        kept = draw(st.permutations(known).flatmap(lambda p: st.integers(0, len(p)).map(lambda n: p[:n])))
        if any("..." in term for term in terms) and draw(st.booleans()):
            kept = [*kept]
            kept.insert(draw(st.integers(0, len(kept))), "...")
        text += "->" + "".join(kept)
    return text, shapes


def _operands(shapes: list[list[int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randint(-3, 4, shape, generator=generator) for shape in shapes]


def brute_force(
    inputs: Sequence[Sequence[str]], output: Sequence[str], operands: Sequence[np.ndarray]
) -> np.ndarray:
    """Index every operand by every label, multiply, sum: shares nothing with the code under test."""
    sizes: dict[str, int] = {}
    for labels, operand in zip(inputs, operands, strict=True):
        for label, size in zip(labels, operand.shape, strict=True):
            if sizes.get(label, 1) == 1:
                sizes[label] = size
    assume(math.prod(max(size, 1) for size in sizes.values()) <= LARGEST_SPACE)
    order = [*output, *(label for label in sizes if label not in output)]
    grid = dict(zip(order, np.indices([sizes[label] for label in order]), strict=True))
    product = np.ones([sizes[label] for label in order], dtype=np.int64)
    for labels, operand in zip(inputs, operands, strict=True):
        index = tuple(
            grid[label] if size != 1 else np.zeros_like(grid[label])
            for label, size in zip(labels, operand.shape, strict=True)
        )
        product = product * operand[index]
    return product.sum(axis=tuple(range(len(output), len(order))))


def _expected(equation: Equation, shapes: list[list[int]], operands: list[torch.Tensor]) -> np.ndarray:
    # Ellipses spelled out by hand, from the right, independently of `bind`.
    widest = max(len(s) - sum(x != "..." for x in t) for t, s in zip(equation.inputs, shapes, strict=True))
    inputs = []
    for term, shape in zip(equation.inputs, shapes, strict=True):
        count = len(shape) - sum(label != "..." for label in term)
        spelled = [f"<{i}>" for i in range(widest - count, widest)]
        inputs.append([name for label in term for name in (spelled if label == "..." else [label])])
    output = [
        name
        for label in equation.output
        for name in ([f"<{i}>" for i in range(widest)] if label == "..." else [label])
    ]
    return brute_force(inputs, output, [x.numpy() for x in operands])


def _check(text: str, shapes: list[list[int]]) -> None:
    equation = Equation.parse(text)
    operands = _operands(shapes)
    expected = torch.from_numpy(np.asarray(_expected(equation, shapes, operands)))
    assert torch.equal(torch.einsum(text, *operands), expected)
    assert torch.equal(einsum(text, *operands), expected)
    dynamic = [[1 if size == 1 else None for size in shape] for shape in shapes]
    assert torch.equal(run(make_plan(equation, dynamic), operands), expected)
    scope = dict(zip("xyzu", operands, strict=False))
    exec(to_python(make_plan(equation, dynamic, target="torch")), scope)
    assert torch.equal(scope["out"], expected)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_random_equations(problem: tuple[str, list[list[int]]]) -> None:
    _check(*problem)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_ten_thousand_random_equations(problem: tuple[str, list[list[int]]]) -> None:
    _check(*problem)
