"""From weights to codes and scales, and back: nearest codes on the best of a few grids.

Letters: K what a product sums over, B blocks of K, R all other axes.

    code = round(weight / scale) + zero      weight' = (code - zero) * scale

The grid that just spans a block's values is rarely the best: a slightly finer one clips the one value at the end and is
nearer to all others. So a few shares of the span are tried for each block, and the scale is then fitted to its codes by
least squares. What has the smallest sum of squares stays.

Weights that were quantized before, and are floats now, lie on a grid already (`earlier_grid`). It is tried as well: on
the same blocks, such weights come back as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from moe_export.export.quantize.earlier_grid import counted_step, exact_scales, steps
from moe_export.export.quantize.scheme import Scheme

Array = np.ndarray[Any, np.dtype[Any]]

_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)
"""Shares of a block's span that a grid may cover. Of normal values, 4 bits are best at 0.75 to 1."""
_FULL = 8 / 7
"""How much further codes of 4 bits reach below zero than above: the extreme of a block gets the lowest code."""
_EIGHTHS = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
"""What the extreme of a block of 8-bit floats may become. One of them is what it was, if it was such a float before."""
_STRIP = 2**20
"""Weights that are searched at once: a few copies of them, 4 MiB each, stay in the processor's cache longer."""
_ASKED = 16
"""Outputs of a strip that are asked whether they were on a grid before: if none was, the others are not asked."""
_REFITS = 2
"""Times that a scale is fitted to its codes; a third changes nothing that can be seen."""


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid. The summed axis stays where it is in the weight.

    Attributes:
        codes: Of the weight's shape, float32 holding whole numbers (or 8-bit floats).
        scales: The same with B in place of K, float32.
        zeros: Like the scales; None where zero is code 0.
        block: Weights that share a scale; the last block may have fewer.
    """

    codes: Array
    scales: Array
    zeros: Array | None
    block: int

    def values(self, axis: int) -> Array:
        """The weights that the codes stand for, float32; `axis` is the summed one."""
        scales = self._spread(self.scales, axis)
        if self.zeros is None:
            return self.codes * scales
        return (self.codes - self._spread(self.zeros, axis)) * scales

    def _spread(self, array: Array, axis: int) -> Array:
        return np.repeat(array, self.block, axis).take(range(self.codes.shape[axis]), axis)


def block_of(size: int, scheme: Scheme) -> int:
    """Weights of one block, of a weight that is summed over `size`."""
    return size if scheme.block is None else min(scheme.block, size)


@dataclass(frozen=True)
class Fitted:
    """The grids of a weight, the summed axis where it is in the weight, B in place of K.

    Attributes:
        scales: Float32 that holds numbers of the type that was asked for.
        zeros: The zero points; None where zero is code 0.
        exact: How many blocks come back bit for bit, of all.
        count: How many there are.
    """

    scales: Array
    zeros: Array | None
    exact: int
    count: int


def fitted(weight: Array, axis: int, scheme: Scheme, wide: np.dtype[Any] | None = None) -> Fitted:
    """The best grids for a weight.

    Args:
        weight: Any shape, any float type.
        axis: The one that a product sums over.
        scheme: The grid.
        wide: The type of the scales; None for the weight's own.
    """
    columns = _columns(weight, axis)  # (K, R)
    found = [
        _best(_blocks(part, scheme), scheme, weight.dtype, wide or weight.dtype) for part in _strips(columns)
    ]
    scale, zero, exact = (np.concatenate(parts, 1) for parts in zip(*found, strict=True))
    zeros = _placed(zero, weight, axis) if scheme.zero_points else None
    return Fitted(_placed(scale, weight, axis), zeros, int(exact.sum()), exact.size)


def encoded(weight: Array, axis: int, scales: Array, zeros: Array | None, scheme: Scheme) -> Array:
    """The codes of a weight on known grids, float32; arguments as for `fitted`, and what it found."""
    columns, scale = _columns(weight, axis), _columns(scales, axis)
    zero = np.zeros_like(scale) if zeros is None else _columns(zeros, axis)
    parts = zip(_strips(columns), _strips(scale, len(columns)), _strips(zero, len(columns)), strict=True)
    found = [
        _codes(_blocks(part, scheme), at, start, scheme).reshape(-1, part.shape[1])[: len(columns)]
        for part, at, start in parts
    ]
    return _placed(np.concatenate(found, 1), weight, axis)


def rounded(weight: Array, axis: int, scheme: Scheme) -> Rounded:
    """Put a weight on the best grids; arguments as for `fitted`."""
    found = fitted(weight, axis, scheme)
    codes = encoded(weight, axis, found.scales, found.zeros, scheme)
    return Rounded(codes, found.scales, found.zeros, block_of(weight.shape[axis], scheme))


def _columns(array: Array, axis: int) -> Array:
    """(K, R): the summed axis first, all others behind it."""
    moved = np.moveaxis(array, axis, 0)
    return moved.reshape(len(moved), -1)


def _placed(columns: Array, weight: Array, axis: int) -> Array:
    """Columns (n, R) in the shape of a weight, n in place of its summed axis."""
    rest = [size for place, size in enumerate(weight.shape) if place != axis]
    return np.moveaxis(columns.reshape(len(columns), *rest), 0, axis)


def _strips(columns: Array, rows: int = 0) -> Iterator[Array]:
    """Columns in strips of so many weights that the copies which the search makes stay small."""
    width = max(1, _STRIP // max(1, rows or len(columns)))
    for start in range(0, max(1, columns.shape[1]), width):
        yield columns[:, start : start + width]


def _blocks(columns: Array, scheme: Scheme) -> Array:
    """(B, K / B, R), float32; zeros behind a last block that is not full."""
    size = len(columns)
    block = block_of(size, scheme)
    count = -(-size // block)
    found = np.zeros((count * block, columns.shape[1]), np.float32)
    found[:size] = columns
    return found.reshape(count, block, -1)


def _best(
    blocks: Array, scheme: Scheme, kind: np.dtype[Any], wide: np.dtype[Any]
) -> tuple[Array, Array, Array]:
    """For each block and column the scale and zero point with the smallest sum of squares, and whether it gives back
    every bit; `kind` is the weights' type, `wide` that of the scales.
    """
    some = blocks[..., :: -(-blocks.shape[-1] // _ASKED)]
    earlier = bool(_fit(some, scheme, kind, wide, earlier=True)[2].any())
    return _fit(blocks, scheme, kind, wide, earlier=earlier)


def _fit(
    blocks: Array, scheme: Scheme, kind: np.dtype[Any], wide: np.dtype[Any], *, earlier: bool
) -> tuple[Array, Array, Array]:
    """The same, with or without grids that the weights may have been on before."""
    scale, zero = _searched(blocks, scheme, kind if earlier else None)
    exact = np.zeros(scale.shape, bool)
    if earlier:
        codes = _codes(blocks, scale, zero, scheme) - zero[:, None]
        scale, exact = exact_scales(blocks, codes, scale, kind, wide)
    return _nonzero(scale.astype(wide).astype(np.float32)), zero, exact


def _searched(blocks: Array, scheme: Scheme, kind: np.dtype[Any] | None) -> tuple[Array, Array]:
    """The best of a few grids, its scale fitted to its codes by least squares; `kind` as for `_grids`."""
    least: Array | None = None
    scale = zero = np.zeros(0, np.float32)
    for tried, at in _grids(blocks, scheme, kind):
        error = _error(blocks, tried, at, scheme)
        if least is None:
            least, scale, zero = error, tried, at
            continue
        better = error < least
        least = np.where(better, error, least)
        scale, zero = np.where(better, tried, scale), np.where(better, at, zero)
    assert least is not None
    if scheme.packing == "float8e4m3":
        return scale, zero
    for _ in range(_REFITS):
        codes = _codes(blocks, scale, zero, scheme) - zero[:, None]
        squares = (codes * codes).sum(1)
        tried = np.where(squares > 0, (codes * blocks).sum(1) / np.maximum(squares, 1), scale)
        tried = np.where(tried * scale > 0, tried, scale).astype(np.float32)
        error = _error(blocks, tried, zero, scheme)
        better = error < least
        least, scale = np.where(better, error, least), np.where(better, tried, scale)
    return scale, zero


def _grids(blocks: Array, scheme: Scheme, kind: np.dtype[Any] | None) -> Iterator[tuple[Array, Array]]:
    """Scales and zero points (B, R) that are worth trying; with the weights' type, those of earlier grids, too."""
    low, high = scheme.bounds
    least, most = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    if scheme.packing == "float8e4m3":
        for extreme in _EIGHTHS:
            scale = _positive(np.maximum(most, -least) / extreme)
            yield scale, np.zeros_like(scale)
        return
    for share in (*_SHARES, *(share / _FULL for share in _SHARES if scheme.signed)):
        if scheme.zero_points:
            scale = _positive((most - least) * (share / (high - low)))
            yield scale, np.clip(np.rint(-least * share / scale), low, high).astype(np.float32)
        else:
            scale = _positive(np.maximum(most, -least) * (share / high))
            turned = scheme.signed & (most > -least)
            yield np.where(turned, -scale, scale), np.zeros_like(scale)
    for step in _earlier_steps(blocks, least, scheme, kind) if kind is not None else ():
        scale = _positive(step)
        if scheme.zero_points:
            yield scale, np.clip(np.rint(-least / scale), low, high).astype(np.float32)
        else:
            yield scale, np.zeros_like(scale)
            if scheme.signed:
                yield -scale, np.zeros_like(scale)


def _earlier_steps(blocks: Array, least: Array, scheme: Scheme, kind: np.dtype[Any]) -> Iterator[Array]:
    """Steps (B, R) of grids that the weights may have been on before."""
    low, high = scheme.bounds
    step = steps(blocks, high - low)
    yield step
    yield step / 2
    if kind.itemsize < step.dtype.itemsize:
        origin = least if scheme.zero_points else np.zeros_like(least)
        yield counted_step(blocks, origin, int(max(-low, high)))


def _nonzero(scale: Array) -> Array:
    """Scales of values that are 0 in a narrow type are 1."""
    return np.where(scale == 0, 1, scale).astype(np.float32)


def _positive(scale: Array) -> Array:
    """Scales that can be divided by: a block of zeros has scale 1."""
    return np.where(scale > np.finfo(np.float32).tiny, scale, 1).astype(np.float32)


def _codes(blocks: Array, scale: Array, zero: Array, scheme: Scheme) -> Array:
    """The codes (B, K / B, R) of blocks under scales and zero points (B, R)."""
    low, high = scheme.bounds
    found = blocks / scale[:, None]
    if scheme.packing == "float8e4m3":
        return np.clip(found, low, high).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.rint(found, out=found)
    found += zero[:, None]
    return np.clip(found, low, high, out=found)


def _error(blocks: Array, scale: Array, zero: Array, scheme: Scheme) -> Array:
    """The sum of squares of what rounding changes, (B, R)."""
    difference = _codes(blocks, scale, zero, scheme)
    difference -= zero[:, None]
    difference *= scale[:, None]
    difference -= blocks
    found: Array = np.einsum("bkr,bkr->br", difference, difference)
    return found
