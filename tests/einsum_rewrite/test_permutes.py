"""A slow permute is two fast ones: the same permute, both of them fast, and only where that is cheaper."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from moe_export.einsum_rewrite.permutes import APART, composed, in_two, is_fast, permute_price, price_of_two
from moe_export.einsum_rewrite.targets import read_target

CPU = read_target("onnxruntime-cpu")


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_every_permute_is_fast_or_two_fast_ones(rank: int) -> None:
    sizes = (16.0,) * rank
    x = np.arange(2**rank).reshape((2,) * rank)
    slow = []
    for order in permutations(range(rank)):
        two = in_two(CPU, order, sizes)
        assert (two is None) == is_fast(order), order
        if two is not None:
            slow.append(order)
            assert all(map(is_fast, two))
            np.testing.assert_array_equal(x.transpose(two[0]).transpose(two[1]), x.transpose(order))
            assert composed(*two) == order
    assert slow == [order for order in permutations(range(rank)) if not is_fast(order)]
    assert bool(slow) == (rank > 2)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (4, 64, 4), (3, 1, 200), (1, 1, 1), (0, 7, 9), (300, 2, 2)])
def test_two_are_taken_exactly_where_they_cost_less(sizes: tuple[int, ...]) -> None:
    floats = tuple(map(float, sizes))
    pairs = [
        price_of_two(CPU, first, second, floats)
        for first in permutations(range(3))
        for second in permutations(range(3))
        if composed(first, second) == (2, 1, 0)
    ]
    two = in_two(CPU, (2, 1, 0), floats)
    assert (two is not None) == (min(pairs) < permute_price(CPU, (2, 1, 0), floats))
    if two is not None:
        assert price_of_two(CPU, *two, floats) == min(pairs)


def test_the_barrier_must_pay() -> None:
    """One element less than where both cost the same, and one more: rows, then a swap of the last two axes."""
    saved = CPU.scatter - CPU.swap - CPU.rows
    same = APART * CPU.node / saved / (8 * 8)
    assert in_two(CPU, (1, 0, 3, 2), (same * 0.999, 1.5, 8.0, 8.0)) is not None
    assert in_two(CPU, (1, 0, 3, 2), (same * 0.999 / 1.5, 1.5, 8.0, 8.0)) is None
    assert in_two(CPU, (1, 0, 3, 2), (same * 1.001 / 1.5, 1.5, 8.0, 8.0)) == ((1, 0, 2, 3), (0, 1, 3, 2))


@pytest.mark.parametrize("engine", ["onnx", "tensorrt", "onnxruntime-cuda", "torch"])
def test_only_engines_that_gain_split(engine: str) -> None:
    assert in_two(read_target(engine), (2, 1, 0), (512.0, 512.0, 512.0)) is None


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 3, 2), (0, 3, 2, 1), (3, 2, 1, 0), (3, 1, 4, 0, 2)])
def test_what_is_slow(order: tuple[int, ...]) -> None:
    assert not is_fast(order)
