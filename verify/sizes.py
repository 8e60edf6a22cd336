"""Which sizes a dynamic dimension is tried at.

Graphs go wrong at sizes that nobody tried: a 1 that was taken for a broadcast, a loop that was unrolled for
the traced length, a chunk count that was baked in. So every dimension is tried at 1 (or its minimum), one below,
five above, at its maximum, twice, half and three times the traced size, together with the others and alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from moe_export.domain import evaluate
from moe_export.verify.specs import DimRange, TensorSpec

Change = Callable[[DimRange], int]

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


def sizes_to_try(dims: Sequence[DimRange]) -> Iterator[tuple[dict[str, int], bool]]:
    """Sizes other than the traced ones, each once, the most telling first.

    Yields:
        The sizes by dimension name, all within their ranges, and whether they are only a reserve.
    """
    traced = {dim.name: dim.traced for dim in dims}
    seen = [traced]
    for changed, change, reserve in _changes(dims):
        sizes = traced | {dim.name: dim.clamp(change(dim)) for dim in changed}
        if sizes not in seen:
            seen.append(sizes)
            yield sizes, reserve


def _changes(dims: Sequence[DimRange]) -> Iterator[tuple[Sequence[DimRange], Change, bool]]:
    alone = [[dim] for dim in dims] if len(dims) > 1 else []
    yield from ((dims, change, False) for change in _TOGETHER)
    yield from ((one, change, False) for change in _ALONE_FIRST for one in alone)
    yield from ((dims, change, False) for change in _TOGETHER_LATER)
    yield from ((one, change, False) for change in _ALONE_LATER for one in alone)
    yield from ((dims, change, True) for change in _RESERVE)
    yield from ((one, change, True) for change in _RESERVE for one in alone)


def shape_at(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input when its dynamic dimensions have these sizes.

    Raises:
        UsageError: The shape names an unknown dimension, or says something that is no expression of sizes.
    """
    return tuple(size if isinstance(size, int) else evaluate(size, sizes) for size in spec.shape)
