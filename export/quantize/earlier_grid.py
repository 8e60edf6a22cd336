"""Weights that were quantized before and are floats now: the step of their grid, and its scale to the last bit.

Letters as in `rounding`: B blocks of K weights, R outputs.

A step shows in the differences between values, as their greatest common divisor. A scale that is near the right one
gives the right codes, and each code c of a weight w then says between which two numbers the scale must be:

    c * scale rounds to w     ⇔     (w - ulp / 2) / c  <=  scale  <=  (w + ulp / 2) / c

What all weights of a block allow is an interval. Where it holds a number of the scale's type, that number gives back
every bit of them.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_EUCLID = 2
"""Divisions for the greatest common divisor: few are left of codes that lie as near each other as weights' do."""
_SAMPLE = 16
"""Values of a block that are asked whether they lie on a grid. On a wrong one, so many never all do."""
_SLACK = 64
"""Units in the last place of float32 by which a least-squares scale may be off, and all that is computed with it."""


def steps(blocks: Array, codes: float) -> Array:
    """The largest step that every value of a block, and every difference between two, is a multiple of: (B, R).

    Args:
        blocks: Values (B, K, R), float32.
        codes: How many steps there may be from the least to the greatest; what is far below such a step is rounding.

    Returns:
        0 where a block has one value, and nothing of use where its values lie on no grid.
    """
    ordered = np.sort(np.concatenate([blocks, np.zeros_like(blocks[:, :1])], 1), axis=1)  # 0 is on every grid
    least = ordered[:, :1]
    far = ordered - least  # (B, K, R)
    noise = far[:, -1:] / (2 * codes)
    gaps = np.diff(ordered, axis=1)
    step = _least_above(gaps, noise)
    for _ in range(_EUCLID):
        whole = np.where(step > 0, step, 1)
        rest = np.abs(far - np.rint(far / whole) * whole)
        smaller = _least_above(rest, noise)
        step = np.where((step > 0) & (smaller > 0), smaller, step)
    return step[:, 0].astype(np.float32)


def _least_above(values: Array, bound: Array) -> Array:
    """The least of what is above a bound, (B, 1, R); 0 where nothing is."""
    least = np.where(values > bound, values, np.inf).min(1, initial=np.inf, keepdims=True)
    found: Array = np.where(np.isfinite(least), least, 0)
    return found


def counted_step(blocks: Array, origin: Array, most: int) -> Array:
    """The step of a block that spans between `most / 2` and `most` steps, of those the one that fits best, (B, R).

    Values of half precision are rounded by nearly a step of 8 bits, so that differences between them say little; but
    what a block spans is a whole number of steps.

    Args:
        blocks: Values (B, K, R), float32.
        origin: A value on the grid, (B, R): what a block spans is counted from there.
        most: Steps that there may be.
    """
    far = blocks - origin[:, None]
    extent = np.abs(far).max(1)
    whole = np.where(extent > 0, extent, 1)
    sample = far[:, :: max(1, far.shape[1] // _SAMPLE)] / whole[:, None]
    least, count = np.full(extent.shape, np.inf, np.float32), np.ones_like(extent)
    for tried in range(most // 2, most + 1):
        scaled = sample * np.float32(tried)
        error = np.square(scaled - np.rint(scaled)).sum(1)
        count = np.where(error < least, tried, count)
        least = np.minimum(error, least)
    found: Array = (extent / count).astype(np.float32)
    return found


def exact_scales(
    blocks: Array, codes: Array, scale: Array, kind: np.dtype[Any], wide: np.dtype[Any]
) -> tuple[Array, Array]:
    """Scales whose products with codes are the weights bit for bit, where there are such.

    Args:
        blocks: The weights (B, K, R), float32 that holds numbers of `kind`.
        codes: What they are multiples of, whole numbers or 8-bit floats, less the zero point.
        scale: Near the scales, (B, R).
        kind: The weights' type, that products are rounded to.
        wide: The type of the scales.

    Returns:
        The scales (B, R), float32 that holds numbers of `wide`, and whether they give back every bit.
    """
    unit = 1.5 * float(ml_dtypes.finfo(kind).eps) / 2 + _SLACK * 2.0**-24  # type: ignore[no-untyped-call]
    moved = np.square(codes * scale[:, None] - blocks).sum(1)
    near = moved <= unit * unit * np.square(blocks).sum(1)
    found = np.where(near, scale, 0).astype(wide).astype(np.float32)
    exact = np.zeros(scale.shape, bool)
    if near.any():
        at = np.nonzero(near)
        weights, taken = blocks.transpose(0, 2, 1)[at], codes.transpose(0, 2, 1)[at]  # (n, K)
        tried = _allowed(weights, taken, scale[at], kind).astype(wide).astype(np.float32)
        with np.errstate(over="ignore"):
            given = (taken * tried[:, None]).astype(kind).astype(np.float32)
        exact[at] = (given == weights).all(1) & (tried != 0)
        found[at] = np.where(exact[at], tried, scale[at])
    return np.where(exact, found, scale), exact


def _allowed(weights: Array, codes: Array, scale: Array, kind: np.dtype[Any]) -> Array:
    """The middle of what the weights (n, K) allow as scale, (n,), float64."""
    size = np.abs(weights).astype(kind)
    infinite = np.full_like(size, np.inf)
    here = size.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        below = np.nextafter(size, -infinite).astype(np.float64)
        above = np.nextafter(size, infinite).astype(np.float64)
        reach = np.abs(codes).astype(np.float64)
        low = np.where(reach > 0, (here + below) / 2 / reach, 0).max(1)
        high = np.where(reach > 0, (here + above) / 2 / reach, np.inf).min(1)
    middle: Array = np.where(np.isfinite(high), (low + high) / 2, 1.0) * np.sign(scale)
    return middle
