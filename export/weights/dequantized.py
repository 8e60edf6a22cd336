"""Weights that are stored as codes of few bits with scales, as recipes that give floats.

```
words (N, K / 8) int32 ─▶ Unpacked (N, K) ─▶ Mapped: less 8, or a table ─┐
scales (N, K / 128) ─▶ Picked, if groups are not in order ───────────────┴▶ Dequantized (N, K) float32
```
Each step reads no more of its source than it was asked for, so that one expert at a time is in memory. A product of a
code and a scale has few bits, is exact in float32, and is rounded once, when it becomes a narrower type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moe_export.export.weights.recipe import Array, Recipe, np_dtype

_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True, eq=False)
class Unpacked(Recipe):
    """Codes out of words that hold several.

    Attributes:
        source: The words, of any integer type.
        axis: The one along which codes stand in a word.
        bits: Of a code.
        size: Codes along the axis; the last word may have room for more.
        order: Where in a word each of its codes stands, from the lowest bits on; None for one behind another.
    """

    source: Recipe
    axis: int
    bits: int
    size: int
    order: tuple[int, ...] | None = None
    dtype = ir.DataType.UINT8

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        sizes = self.source.shape
        return (*sizes[: self.axis], self.size, *sizes[self.axis + 1 :])

    @property
    def _held(self) -> int:
        """Codes in a word."""
        return np_dtype(self.source.dtype).itemsize * 8 // self.bits

    def read(self, axis: int, start: int, stop: int) -> Array:
        if axis != self.axis:
            return self._apart(self.source.read(axis, start, stop), 0, self.size)
        first = start // self._held
        words = self.source.read(axis, first, -(-stop // self._held))
        return self._apart(words, start - first * self._held, stop - first * self._held)

    def _apart(self, words: Array, start: int, stop: int) -> Array:
        """Codes from `start` to `stop`, counted from the first of these words."""
        plain = np.ascontiguousarray(np.moveaxis(words, self.axis, -1))
        plain = plain.view(f"u{plain.dtype.itemsize}")
        places = np.array(self.order or range(self._held), plain.dtype)
        codes = (plain[..., None] >> (places * self.bits)) & ((1 << self.bits) - 1)
        flat = codes.reshape(*plain.shape[:-1], -1)[..., start:stop].astype(np.uint8)
        return np.moveaxis(flat, -1, self.axis)

    def steps(self) -> tuple[str, ...]:
        return (*self.source.steps(), "unpacked")


@dataclass(frozen=True, eq=False)
class Mapped(Recipe):
    """Each element as a float that a function makes of it."""

    source: Recipe
    function: Callable[[Array], Array]
    dtype = _FLOAT

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    def read(self, axis: int, start: int, stop: int) -> Array:
        return self.function(self.source.read(axis, start, stop)).astype(np.float32)

    def steps(self) -> tuple[str, ...]:
        return self.source.steps()


@dataclass(frozen=True, eq=False)
class Picked(Recipe):
    """Rows of a small array in any order, each as often as it is named: `source.take(index, axis)`."""

    source: Recipe
    axis: int
    index: Array

    @property
    def dtype(self) -> ir.DataType:  # type: ignore[override]
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        sizes = self.source.shape
        return (*sizes[: self.axis], len(self.index), *sizes[self.axis + 1 :])

    def read(self, axis: int, start: int, stop: int) -> Array:
        if axis == self.axis:
            return self.source.array().take(self.index[start:stop], axis)
        return self.source.read(axis, start, stop).take(self.index, self.axis)

    def steps(self) -> tuple[str, ...]:
        return (*self.source.steps(), "picked")


@dataclass(frozen=True, eq=False)
class Dequantized(Recipe):
    """`(codes - zeros) * scales`, float32.

    Attributes:
        codes: In the shape of the weight.
        scales: As many axes; one for each block of the weight.
        zeros: Like the scales; None for zeros.
        blocks: Sizes of a block; the last one along an axis may be smaller.
    """

    codes: Recipe
    scales: Recipe
    zeros: Recipe | None
    blocks: tuple[int, ...]
    dtype = _FLOAT

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.codes.shape

    def read(self, axis: int, start: int, stop: int) -> Array:
        found = self.codes.read(axis, start, stop).astype(np.float32)
        if self.zeros is not None:
            found -= self._spread(self.zeros, axis, start, stop)
        found *= self._spread(self.scales, axis, start, stop)
        return found

    def _spread(self, source: Recipe, axis: int, start: int, stop: int) -> Array:
        """What belongs to each element from `start` to `stop` of an axis; axes of one block stay of size 1."""
        own = self.blocks[axis]
        first = start // own
        found = source.read(axis, first, -(-stop // own)).astype(np.float32)
        for place, block in enumerate(self.blocks):
            if found.shape[place] > 1 and block > 1:
                found = np.repeat(found, block, place)
            if found.shape[place] > 1:
                at, to = (
                    (start - first * own, stop - first * own) if place == axis else (0, self.shape[place])
                )
                found = found[(slice(None),) * place + (slice(at, to),)]
        return found

    def steps(self) -> tuple[str, ...]:
        return (*self.codes.steps(), "dequantized")
