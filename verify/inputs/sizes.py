"""Which sizes of a dynamic dimension are tried.

Graphs go wrong at sizes that nobody tried: a 1 that was taken for a broadcast, a loop that was unrolled for the
traced length, a chunk count that was baked in, a branch that the example did not take. So every dimension is tried, in
the order of what it finds, at

    1 or the minimum, five above the example, one below, the maximum, twice, half, three times    together, and alone
    one long size: 4096, or as long as its price allows                                           alone
    c + 1, c, c - 1 for each number c in the model's code or in the graph                         together; large, alone
    a ladder 2, 3, 5, 8, ... 513                                                                  alone
    2c, 3c + 1, 2c + 1: chunks and moduli; c // m and one more, where another dimension is m      alone

Two programs that compute different things somewhere do so beyond, or at, a number that stands in one of them:
`if t >= 60`, `range(min(length, 48))`, `chunk = 64`, a table of 512 rows, `Clip(0, 255)`. At most `MOST` sizes are
tried, near the first `MOST_NUMBERS` numbers: those of the graph's domain, of the graph, and of the code that ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from moe_export.domain import evaluate
from moe_export.verify.specs import DimRange, TensorSpec

Change = Callable[[DimRange], int]
Holds = Callable[[Mapping[str, int]], bool]

MOST = 110  # sizes, the reserve not counted: a case takes some milliseconds
MOST_NUMBERS = 16
LONG = (4096, 2048, 1024, 513)
_LADDER = (2, 3, 5, 8, 16, 33, 64, 130, 257, 513)
_TOGETHER_UP_TO = 64  # two large sizes at once are many elements

# In the order of what they find: a slow model may see only the first few.
_TOGETHER: tuple[Change, ...] = (lambda d: 1, lambda d: d.traced + 5, lambda d: d.traced - 1)
_ALONE_FIRST: tuple[Change, ...] = (lambda d: d.traced + 5,)
_TOGETHER_LATER: tuple[Change, ...] = (
    lambda d: d.traced if d.maximum is None else d.maximum,
    lambda d: 2 * d.traced,
    lambda d: d.traced // 2,
    lambda d: 3 * d.traced,
)
_ALONE_LATER: tuple[Change, ...] = (*_TOGETHER, *_TOGETHER_LATER)
# For a model that refuses nearly all of the above, as one whose length must be a multiple of its chunk.
_RESERVE: tuple[Change, ...] = (lambda d: 4 * d.traced, lambda d: 5 * d.traced, lambda d: 6 * d.traced)


def sizes_to_try(
    dims: Sequence[DimRange],
    numbers: Sequence[int] | None = None,
    holds: Holds | None = None,
    most: int = MOST,
) -> Iterator[tuple[dict[str, int], bool]]:
    """Sizes other than the traced ones, without duplicates, the most revealing first.

    Args:
        dims: The dimensions.
        numbers: Near which the model or the graph may behave differently, the most revealing first; None if unknown,
            where the first of the sizes above must do.
        holds: Whether the graph is said to be right at some sizes.
        most: How many sizes.

    Yields:
        The sizes by dimension name, all within their ranges, and whether they are only a reserve.
    """
    traced = {dim.name: dim.traced for dim in dims}
    seen = {tuple(traced.values())}
    count = 0
    for changed, change, reserve in _changes(dims, numbers):
        sizes = traced | {dim.name: dim.clamp(change(dim)) for dim in changed}
        key = tuple(sizes.values())
        if key in seen or not (holds is None or holds(sizes)) or (count >= most and not reserve):
            continue
        seen.add(key)
        count += not reserve
        yield sizes, reserve


def _changes(
    dims: Sequence[DimRange], numbers: Sequence[int] | None
) -> Iterator[tuple[Sequence[DimRange], Change, bool]]:
    alone = [[dim] for dim in dims] if len(dims) > 1 else []
    yield from ((dims, change, False) for change in _TOGETHER)
    yield from ((one, change, False) for change in _ALONE_FIRST for one in alone)
    yield from ((dims, change, False) for change in _TOGETHER_LATER)
    yield from ((one, change, False) for change in _ALONE_LATER for one in alone)
    if numbers is not None:
        yield from _near(dims, [number for number in dict.fromkeys(numbers) if number > 1][:MOST_NUMBERS])
    yield from ((dims, change, True) for change in _RESERVE)
    yield from ((one, change, True) for change in _RESERVE for one in alone)


def _near(dims: Sequence[DimRange], near: Sequence[int]) -> Iterator[tuple[Sequence[DimRange], Change, bool]]:
    """Sizes near numbers, a ladder, chunks and products."""
    each: Sequence[Sequence[DimRange]] = [[dim] for dim in dims]
    whole: Sequence[Sequence[DimRange]] = [dims]
    for number in near:
        together = number <= _TOGETHER_UP_TO
        for size in (number + 1, number, number - 1):
            yield from ((some, _at(size), False) for some in (whole if together else each))
    yield from ((one, _at(size), False) for size in _LADDER for one in each)
    for number in near:
        for size in (2 * number, 3 * number + 1, 2 * number + 1):
            yield from ((one, _at(size), False) for one in each)
    for number in near:
        yield from _products(dims, number)


def _at(size: int) -> Change:
    return lambda dim: size


def _products(dims: Sequence[DimRange], number: int) -> Iterator[tuple[Sequence[DimRange], Change, bool]]:
    """Sizes at which a dimension times another one, at its traced size, comes to a number, and to the next more."""
    for dim in dims:
        for other in dims:
            if other is not dim and other.traced > 1:
                quotient = number // other.traced
                yield from (([dim], _at(size), False) for size in (quotient + 1, quotient))


def long_sizes(dims: Sequence[DimRange], holds: Holds | None = None) -> Iterator[list[dict[str, int]]]:
    """One long size of each dimension, the others as traced: the ones to choose from, the longest first."""
    traced = {dim.name: dim.traced for dim in dims}
    for dim in dims:
        sizes = [
            traced | {dim.name: size} for size in dict.fromkeys(map(dim.clamp, LONG)) if size > 2 * dim.traced
        ]
        yield [each for each in sizes if holds is None or holds(each)]


def shape_at(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input when its dynamic dimensions have these sizes.

    Raises:
        UsageError: The shape names an unknown dimension, or says something that is no expression of sizes.
    """
    return tuple(size if isinstance(size, int) else evaluate(size, sizes) for size in spec.shape)
