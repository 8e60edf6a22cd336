"""`Recipe`: a weight that is not in memory, as where it is stored and what is done to it on the way to the graph.

```
Stored(file, offset) ─▶ Transposed ─▶ Converted ─▶ Part ─▶ Stacked ─▶ pieces, each read, transposed and cast by itself
Held(tensor)         ─┘
```
A recipe is read in parts along one axis, so that a stack of E experts needs the memory of a few of them, and a recipe
without steps has a place in a file that a graph can refer to.
"""

from __future__ import annotations

import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.disk import read_exactly
from moe_export.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]
PIECE = 16 * 2**20
"""Bytes that are read at a time, where a row of the first axis is no larger."""
_LARGE = 2**20
"""Bytes from which on a stretch of a file is read past the system's memory; smaller ones may be read again soon."""


@dataclass(frozen=True)
class ByteRange:
    """Bytes of a file that are a tensor as it is used."""

    file: Path
    offset: int
    length: int


class Recipe(ABC):
    """A weight, described.

    Attributes:
        dtype: Of the elements.
        shape: Sizes.
    """

    dtype: ir.DataType
    shape: tuple[int, ...]

    @abstractmethod
    def read(self, axis: int, start: int, stop: int) -> Array:
        """The elements from `start` to `stop` of one axis, with all axes kept."""

    @abstractmethod
    def steps(self) -> tuple[str, ...]:
        """What is done to what is stored, in words: `transposed`, `cast`, `stacked`."""

    def byte_range(self) -> ByteRange | None:
        """Where it is stored as it is used; None if it is nowhere."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * np_dtype(self.dtype).itemsize

    def array(self) -> Array:
        """The whole; the memory of all of it."""
        if not self.shape:
            return self.read(0, 0, 1)
        return self.read(0, 0, self.shape[0])

    def pieces(self, limit: int = PIECE) -> Iterator[Array]:
        """The whole as contiguous parts, in order, of `limit` bytes or one row of the first axis that has several."""
        axis = next((axis for axis, size in enumerate(self.shape) if size != 1), None)
        if axis is None or self.nbytes <= limit:
            yield np.ascontiguousarray(self.array())
            return
        size = self.shape[axis]
        rows = max(1, limit // max(1, self.nbytes // size))
        for start in range(0, size, rows):
            yield np.ascontiguousarray(self.read(axis, start, min(start + rows, size)))


def np_dtype(dtype: ir.DataType) -> np.dtype[Any]:
    """The NumPy type of an ONNX type (ml_dtypes for those that NumPy lacks)."""
    return np.dtype(dtype.numpy())


@dataclass(frozen=True)
class Stored(Recipe):
    """A tensor in a file, C-contiguous from `offset` on."""

    file: Path
    offset: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    def read(self, axis: int, start: int, stop: int) -> Array:
        kind = np_dtype(self.dtype)
        if self.dtype.itemsize < 1:
            return self._halves()[(slice(None),) * axis + (slice(start, stop),)]
        shape = [stop - start if at == axis else size for at, size in enumerate(self.shape)]
        found = np.empty(shape, kind)
        outer = math.prod(self.shape[:axis])
        inner = math.prod(self.shape[axis + 1 :]) * kind.itemsize
        size = self.shape[axis] if self.shape else 1
        raw = found.reshape(-1).view(np.uint8).reshape(outer, -1) if found.size else found
        if outer == 1 and found.nbytes >= _LARGE:
            read_exactly(self.file, memoryview(raw[0]), self.offset + start * inner)
            return found
        with self.file.open("rb", buffering=0) as file:
            for index in range(outer if found.size else 0):
                _read_into(file.fileno(), raw[index], self.offset + (index * size + start) * inner, self.file)
        return found

    def _halves(self) -> Array:
        """Numbers of 4 bits, two in a byte, the first in the lower half."""
        count = math.prod(self.shape)
        raw = np.empty(-(-count // 2), np.uint8)
        read_exactly(self.file, memoryview(raw), self.offset)  # type: ignore[arg-type]  # as in `_read_into`
        bits = np.stack([raw & 15, raw >> 4], -1).reshape(-1)[:count]
        signed = self.dtype == ir.DataType.INT4
        whole = ((bits ^ 8).astype(np.int8) - 8) if signed else bits
        return whole.astype(np_dtype(self.dtype)).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Two numbers of 4 bits share a byte."""
        return math.ceil(math.prod(self.shape) * self.dtype.itemsize)

    def steps(self) -> tuple[str, ...]:
        return ()

    def byte_range(self) -> ByteRange | None:
        return ByteRange(self.file, self.offset, self.nbytes)


def _read_into(descriptor: int, target: Array, offset: int, file: Path) -> None:
    view = memoryview(target)  # type: ignore[arg-type]  # NumPy 1 does not say that it is a buffer
    while view.nbytes:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise UsageError(
                f"{file} ends before byte {offset + view.nbytes}", hint="is it still being written?"
            )
        view, offset = view[count:], offset + count


@dataclass(frozen=True, eq=False)
class Held(Recipe):
    """A tensor that a live module holds. Args: `whole` is asked anew each time, and shares its memory."""

    whole: Callable[[], Array]
    dtype: ir.DataType
    shape: tuple[int, ...]

    def read(self, axis: int, start: int, stop: int) -> Array:
        found = self.whole()
        return found[(slice(None),) * axis + (slice(start, stop),)] if self.shape else found

    def steps(self) -> tuple[str, ...]:
        return ("held in memory",)


@dataclass(frozen=True, eq=False)
class Transposed(Recipe):
    """The axes in another order, as in ONNX's Transpose."""

    source: Recipe
    order: tuple[int, ...]

    @property
    def dtype(self) -> ir.DataType:  # type: ignore[override]
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.source.shape[axis] for axis in self.order)

    def read(self, axis: int, start: int, stop: int) -> Array:
        return self.source.read(self.order[axis], start, stop).transpose(self.order)

    def steps(self) -> tuple[str, ...]:
        return (*self.source.steps(), "transposed")


@dataclass(frozen=True, eq=False)
class Converted(Recipe):
    """Elements of another type."""

    source: Recipe
    dtype: ir.DataType
    finite: bool = False
    """Whether what is finite stays so: clipped to what the type can hold."""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    def read(self, axis: int, start: int, stop: int) -> Array:
        found, kind = self.source.read(axis, start, stop), np_dtype(self.dtype)
        if self.finite:
            import ml_dtypes

            limit = float(ml_dtypes.finfo(kind).max)  # type: ignore[no-untyped-call]
            found = found.astype(np.float32)
            found = np.where(np.isfinite(found), np.clip(found, -limit, limit), found)
        return found.astype(kind)

    def steps(self) -> tuple[str, ...]:
        return (*self.source.steps(), "cast")


@dataclass(frozen=True, eq=False)
class Reshaped(Recipe):
    """The same elements in the same order under another shape."""

    source: Recipe
    shape: tuple[int, ...]

    @property
    def dtype(self) -> ir.DataType:  # type: ignore[override]
        return self.source.dtype

    def read(self, axis: int, start: int, stop: int) -> Array:
        own, theirs = _lead(self.shape), _lead(self.source.shape)
        if axis == own and own < len(self.shape) and theirs < len(self.source.shape):
            row = math.prod(self.shape[own + 1 :])
            other = math.prod(self.source.shape[theirs + 1 :])
            if other and start * row % other == 0 and stop * row % other == 0:
                found = self.source.read(theirs, start * row // other, stop * row // other)
                return np.ascontiguousarray(found).reshape(
                    *self.shape[:axis], stop - start, *self.shape[axis + 1 :]
                )
        whole = self.source.array().reshape(self.shape)
        return whole[(slice(None),) * axis + (slice(start, stop),)] if self.shape else whole

    def steps(self) -> tuple[str, ...]:
        return self.source.steps()

    def byte_range(self) -> ByteRange | None:
        return self.source.byte_range()


def _lead(shape: Sequence[int]) -> int:
    """The first axis of several elements."""
    return next((axis for axis, size in enumerate(shape) if size != 1), len(shape))


@dataclass(frozen=True, eq=False)
class Part(Recipe):
    """A stretch of one axis."""

    source: Recipe
    axis: int
    start: int
    stop: int

    @property
    def dtype(self) -> ir.DataType:  # type: ignore[override]
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        sizes = self.source.shape
        return (*sizes[: self.axis], self.stop - self.start, *sizes[self.axis + 1 :])

    def read(self, axis: int, start: int, stop: int) -> Array:
        if axis == self.axis:
            return self.source.read(axis, self.start + start, self.start + stop)
        if self.stop - self.start < self.source.shape[self.axis]:
            mine = self.source.read(self.axis, self.start, self.stop)
            return mine[(slice(None),) * axis + (slice(start, stop),)]
        return self.source.read(axis, start, stop)

    def steps(self) -> tuple[str, ...]:
        return self.source.steps() if self.byte_range() or self.source.steps() else ("cut out",)

    def byte_range(self) -> ByteRange | None:
        whole = self.source.byte_range()
        if whole is None or self.axis != min(_lead(self.source.shape), self.axis):
            return None
        row = whole.length // self.source.shape[self.axis]
        return ByteRange(whole.file, whole.offset + self.start * row, (self.stop - self.start) * row)


@dataclass(frozen=True, eq=False)
class Stacked(Recipe):
    """Tensors of one shape behind each other on a new first axis."""

    parts: tuple[Recipe, ...]

    @property
    def dtype(self) -> ir.DataType:  # type: ignore[override]
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.parts), *self.parts[0].shape)

    def read(self, axis: int, start: int, stop: int) -> Array:
        if axis == 0:
            return np.stack([part.array() for part in self.parts[start:stop]])
        return np.stack([part.read(axis - 1, start, stop) for part in self.parts])

    def steps(self) -> tuple[str, ...]:
        return (*dict.fromkeys(step for part in self.parts for step in part.steps()), "stacked")

    def byte_range(self) -> ByteRange | None:
        """Parts that lie one behind another in a file are a stack already."""
        places = [part.byte_range() for part in self.parts]
        if any(place is None for place in places):
            return None
        found = [place for place in places if place is not None]
        for one, other in itertools.pairwise(found):
            if (one.file, one.offset + one.length) != (other.file, other.offset):
                return None
        return ByteRange(found[0].file, found[0].offset, sum(place.length for place in found))


@dataclass(frozen=True, eq=False)
class Computed(Recipe):
    """What a few operators make of weights, run when it is written. `run` gives the whole."""

    run: Callable[[], Array]
    dtype: ir.DataType
    shape: tuple[int, ...]

    def read(self, axis: int, start: int, stop: int) -> Array:
        found = self.run()
        return found[(slice(None),) * axis + (slice(start, stop),)] if self.shape else found

    def steps(self) -> tuple[str, ...]:
        return ("computed",)


class RecipeTensor(ir.LazyTensor):
    """A recipe as an `onnx_ir` tensor; its elements are read only where somebody asks for them."""

    __slots__ = ("recipe",)

    def __init__(self, recipe: Recipe, name: str | None = None) -> None:
        shape = ir.Shape(recipe.shape)
        super().__init__(lambda: ir.tensor(recipe.array(), recipe.dtype), recipe.dtype, shape, name=name)
        self.recipe = recipe

    def numpy(self) -> Array:
        """The whole in memory."""
        return self.recipe.array()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found = self.recipe.array()
        return found if dtype is None else found.astype(dtype)

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.recipe.array().__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.recipe.array().__dlpack_device__()

    def tobytes(self) -> bytes:
        """The whole, in ONNX's order of bytes."""
        return b"".join(piece.tobytes() for piece in self.recipe.pieces())

    def __repr__(self) -> str:
        return f"{type(self).__name__}<{self.dtype},{self.shape}>({self.name})"


def recipe_of(value: ir.Value | None) -> Recipe | None:
    """The recipe that an initializer has; None for any other value."""
    tensor = value.const_value if value is not None else None
    return tensor.recipe if isinstance(tensor, RecipeTensor) else None
