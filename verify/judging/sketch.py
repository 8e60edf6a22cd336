"""A compact summary of many differences, enough to judge them again at any tolerance.

Whether |d| <= atol + rtol * |r| holds for every element is decided by few of them. An element with a smaller
reference and no smaller difference than another is the harder one, at every tolerance; what no element beats is
the front. The other elements pass wherever the front passes, in floating point too, since rounding keeps order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from moe_export.verify.judging.tolerance import Margin
from moe_export.verify.specs import Array

Front = tuple[tuple[float, float], ...]
Decades = tuple[tuple[int, int], ...]

MOST = (
    256  # points that a report stores; a longer front is thinned to its convex hull, which decides the same
)
_LOWEST, _HIGHEST = -20, 20


def front_of(sizes: Array, differences: Array) -> Front:
    """The elements that decide, as (|reference|, |difference|), both growing.

    Args:
        sizes: |reference|, float64, any shape.
        differences: |candidate - reference|, of the same shape; NaN where there is nothing to measure.
    """
    counted = differences > 0  # False for NaN; a difference of 0 passes everywhere
    if not counted.any():
        return ()
    r, d = sizes[counted], differences[counted]
    order = np.lexsort((-d, r))
    r, d = r[order], d[order]
    before = np.concatenate(([-1.0], np.maximum.accumulate(d)[:-1]))
    kept = d > before
    points = [(float(a), float(b)) for a, b in zip(r[kept], d[kept], strict=True)]
    return tuple(points if len(points) <= MOST else _hull(points))


def holds(front: Iterable[tuple[float, float]], margin: Margin) -> bool:
    """Whether every element is within `margin`."""
    return all(not d - (margin.atol + margin.rtol * r) > 0 for r, d in front)


def needed_rtol(front: Iterable[tuple[float, float]], atol: float) -> float:
    """The least rtol at which everything passes, with this atol; inf if none does."""
    return max(((d - atol) / r if r > 0 else math.inf for r, d in front if d > atol), default=0.0)


def decades_of(differences: Array) -> Decades:
    """How many differences lie in [10**n, 10**(n+1)), by n; those of 0 and NaN are in none."""
    positive = differences[differences > 0]
    if not positive.size:
        return ()
    exponents = np.clip(np.floor(np.log10(positive)), _LOWEST, _HIGHEST).astype(int)
    values, counts = np.unique(exponents, return_counts=True)
    return tuple((int(value), int(count)) for value, count in zip(values, counts, strict=True))


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper convex hull of points that are sorted by their first number."""
    hull: list[tuple[float, float]] = []
    for r, d in points:
        while len(hull) > 1 and _turns_left(hull[-2], hull[-1], (r, d)):
            hull.pop()
        hull.append((r, d))
    return hull


def _turns_left(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) >= 0
