"""Weights on a grid as recipes: codes, scales, zero points, and the weights that these stand for.

```
source (E, K, N) ─▶ one expert (K, N) in float ─▶ rounded ─┬▶ Codes   (E, K, N)
                                                          ├▶ Scales  (E, B, N)
                                                          ├▶ Zeros   (E, B, N)
                                                          └▶ Values  (E, K, N) in float: right by definition
```
However large a stack is, one expert of it at a time is in memory as float. Scales, which take the search, are computed
once and kept: they are a small part of the codes, and codes are asked for before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from moe_export.export.quantize.rounding import Array, Fitted, Rounded, block_of, encoded, fitted
from moe_export.export.quantize.scheme import Scheme
from moe_export.export.weights.recipe import Part, Recipe, Transposed, np_dtype

_BYTES = ir.DataType.UINT8
_SAMPLE = 8
"""Outputs that are asked whether scales of the weight's own type would do."""
_MIDDLE = 8
"""What is added to a signed code of 4 bits that is stored in half a byte."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A weight, and the grid that it is put on.

    Attributes:
        source: The weight in float, two axes or a stack (E, ...) of such.
        axis: The axis that products sum over.
        scheme: The grid.
    """

    source: Recipe
    axis: int
    scheme: Scheme
    _fitted: dict[int, Fitted] = field(default_factory=dict, repr=False)
    _kept: dict[int, Rounded] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """How many weights are stacked, each of which is rounded by itself."""
        return self.source.shape[0] if self._stacked else 1

    @property
    def _stacked(self) -> bool:
        return len(self.source.shape) > 2 and self.axis != 0

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return block_of(self.source.shape[self.axis], self.scheme)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The weight's shape with blocks in place of the summed axis."""
        sizes = list(self.source.shape)
        sizes[self.axis] = -(-sizes[self.axis] // self.block)
        return tuple(sizes)

    @cached_property
    def scale_dtype(self) -> ir.DataType:
        """The type of the scales: the weight's own, or float32 for 8-bit floats in half precision that were multiplied
        by scales of float32 before. Those come back bit for bit only if they are again.
        """
        own = self.source.dtype
        if self.scheme.packing != "float8e4m3" or self.scheme.tensorrt or own is ir.DataType.FLOAT:
            return own
        first = Part(self.source, 0, 0, 1) if self._stacked else self.source
        other = len(first.shape) - 1 if self.axis != len(first.shape) - 1 else len(first.shape) - 2
        sample = first.read(other, 0, min(_SAMPLE, first.shape[other]))
        narrow, wide = (
            fitted(sample, self.axis, self.scheme, np.dtype(kind)) for kind in (sample.dtype, np.float32)
        )
        return ir.DataType.FLOAT if narrow.exact < wide.exact == wide.count else own

    def weight(self, index: int) -> Array:
        """One of the stacked weights in float."""
        return self.source.read(0, index, index + 1)[0] if self._stacked else self.source.array()

    def rounded(self, index: int) -> Rounded:
        """One of the stacked weights on its grid."""
        if index in self._kept:
            return self._kept_here(index)
        weight, axis = self.weight(index), self.inner_axis
        found = self._fit(index, weight)
        codes = encoded(weight, axis, found.scales, found.zeros, self.scheme)
        return Rounded(codes, found.scales, found.zeros, self.block)

    def scales(self, index: int) -> tuple[Array, Array | None]:
        """Scales and zero points of one of the stacked weights."""
        if index in self._kept:
            return self._kept_here(index).scales, self._kept_here(index).zeros
        found = self._fitted.get(index) or self._fit(index, self.weight(index))
        return found.scales, found.zeros

    @property
    def summed(self) -> int:
        """How many weights a product sums over."""
        return self.source.shape[self.axis]

    @property
    def calibrated(self) -> bool:
        """Whether codes are kept that are not those which are nearest."""
        return bool(self._kept)

    def columns(self, index: int) -> Array:
        """One of the stacked weights in float with the summed axis first, (K, N)."""
        weight = self.weight(index)
        return weight if self.inner_axis == 0 else weight.T

    def keep(self, index: int, found: Rounded) -> None:
        """Take codes of one of the stacked weights; they and their scales have the summed axis first."""
        self._kept[index] = replace(found, codes=found.codes.astype(np_dtype(self.scheme.stored)))

    def turned(self) -> Grid:
        """The same of a weight (N, K) as (K, N), or the other way round."""
        source = Transposed(self.source, (1, 0))
        return Grid(source, 1 - self.axis, self.scheme, _kept=self._kept)

    def _kept_here(self, index: int) -> Rounded:
        found = self._kept[index]
        codes = found.codes.astype(np.float32)
        if self.inner_axis == 0:
            return replace(found, codes=codes)
        return Rounded(codes.T, found.scales.T, None if found.zeros is None else found.zeros.T, found.block)

    def _fit(self, index: int, weight: Array) -> Fitted:
        if index not in self._fitted:
            kind = np_dtype(self.scale_dtype)
            self._fitted[index] = fitted(weight, self.inner_axis, self.scheme, kind)
        return self._fitted[index]

    @property
    def inner_axis(self) -> int:
        """The summed axis within one of the stacked weights."""
        return self.axis - 1 if self._stacked else self.axis

    def errors(self) -> list[tuple[float, float]]:
        """For each of the stacked weights the sum of squares of what rounding changes, and that of the weight."""
        found = []
        for index in range(self.count):
            weight = self.weight(index)
            values = self.rounded(index).values(self.inner_axis).astype(weight.dtype)
            weight = weight.astype(np.float32)
            moved = values.astype(np.float32) - weight
            found.append((_squares(moved), _squares(weight)))
        return found


def _squares(array: Array) -> float:
    return float(np.square(array, dtype=np.float64).sum())


@dataclass(frozen=True, eq=False)
class OnGrid(Recipe):
    """One of the arrays that a weight on a grid consists of.

    Attributes:
        grid: The weight.
        part: Takes the array out of what one of the stacked weights became.
        dtype: Of the result.
        shape: Of all of them.
    """

    grid: Grid
    part: Callable[[Grid, int], Array]
    dtype: ir.DataType
    shape: tuple[int, ...]

    def read(self, axis: int, start: int, stop: int) -> Array:
        kind = np_dtype(self.dtype)
        if not self.grid.count > 1 and axis == 0 and (start, stop) == (0, self.shape[0]):
            return self.part(self.grid, 0).astype(kind).reshape(self.shape)
        if self.grid.count > 1 and axis == 0:
            return np.stack([self.part(self.grid, index).astype(kind) for index in range(start, stop)])
        whole = self.array()
        return whole[(slice(None),) * axis + (slice(start, stop),)]

    def steps(self) -> tuple[str, ...]:
        return ("quantized",)

    @property
    def nbytes(self) -> int:
        """Two codes of 4 bits share a byte."""
        return math.ceil(math.prod(self.shape) * self.dtype.itemsize)

    def pieces(self, limit: int = 0) -> Iterator[Array]:
        """One of the stacked weights at a time, as it stands in a file."""
        if self.grid.count == 1 or (self.dtype.itemsize < 1 and math.prod(self.shape[1:]) % 2):
            yield _in_file(self.array(), self.dtype)
            return
        for index in range(self.grid.count):
            yield _in_file(self.read(0, index, index + 1), self.dtype)


def _in_file(array: Array, dtype: ir.DataType) -> Array:
    if dtype.itemsize >= 1:
        return np.ascontiguousarray(array)
    return halves(array.astype(np.int8).reshape(-1))


def halves(codes: Array) -> Array:
    """Codes of 4 bits (..., N) in bytes (..., N / 2), the first of two in the lower half."""
    bits = codes.astype(np.int8).view(np.uint8) & 0x0F
    if bits.shape[-1] % 2:
        bits = np.concatenate([bits, np.zeros_like(bits[..., :1])], -1)
    found: Array = bits[..., ::2] | (bits[..., 1::2] << 4)
    return found


def codes_of(grid: Grid) -> OnGrid:
    """The codes, in the shape of the weight."""
    return OnGrid(grid, lambda at, index: at.rounded(index).codes, grid.scheme.stored, grid.source.shape)


def bytes_of(grid: Grid) -> OnGrid:
    """Codes of 4 bits (E, K, N), two in a byte (E, K, N / 2), where no operator reads them as they are; of 8 bits, one.

    They are not negative: signed ones have 8 or 128 added.
    """
    if grid.scheme.packing == "int8":
        more = 0 if grid.scheme.zero_points else 2**7
        return OnGrid(grid, lambda at, index: at.rounded(index).codes + more, _BYTES, grid.source.shape)
    shape = (*grid.source.shape[:-1], -(-grid.source.shape[-1] // 2))
    middle = 0 if grid.scheme.zero_points else _MIDDLE
    return OnGrid(grid, lambda at, index: halves(at.rounded(index).codes + middle), _BYTES, shape)


def scales_of(grid: Grid) -> OnGrid:
    """The scales."""
    return OnGrid(grid, lambda at, index: at.scales(index)[0], grid.scale_dtype, grid.scale_shape)


def zeros_of(grid: Grid, dtype: ir.DataType) -> OnGrid:
    """The zero points, where the scheme has them."""
    return OnGrid(grid, _zeros, dtype, grid.scale_shape)


def _zeros(grid: Grid, index: int) -> Array:
    zeros = grid.scales(index)[1]
    assert zeros is not None
    return zeros


def values_of(grid: Grid) -> OnGrid:
    """The weights that the codes stand for, in the weight's own type.

    A code has few bits, so its product with a scale is exact in float32, and is rounded once.
    """
    return OnGrid(
        grid,
        lambda at, index: at.rounded(index).values(at.inner_axis),
        grid.source.dtype,
        grid.source.shape,
    )
