"""`Tables`: numbers of sizes, and tables of cosines and sines, as constants where sizes are fixed, else computed.

cos(2 pi jk / n)      the remainder of jk by n is exact, so the angle is as exact for the last entry as for the first
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.graph_builder import GraphBuilder

Number = int | ir.Value
"""A size: one that is fixed, or (1,) of int64."""


class Tables:
    """Writes numbers, and tables of cosines and sines: constants where sizes are fixed, else computed.

    Attributes:
        w: The builder.
    """

    def __init__(self, w: GraphBuilder) -> None:
        self.w = w

    # Numbers

    def tensor(self, number: Number) -> ir.Value:
        """(1,) of int64."""
        return self.w.ints(number) if isinstance(number, int) else number

    def apply(self, kind: str, one: Number, other: Number) -> Number:
        """`Add`, `Sub`, `Mul`, `Div` or `Max` of numbers that are not negative."""
        if isinstance(one, int) and isinstance(other, int):
            return _ON_NUMBERS[kind](one, other)
        return self.w.op(kind, self.tensor(one), self.tensor(other))

    def up(self, number: Number, by: int) -> Number:
        """How many times `by` it takes."""
        return self.apply("Div", self.apply("Add", number, by - 1), by)

    def given(self, value: ir.Value | None) -> Number:
        """A number that an opaque node was given."""
        assert value is not None
        known = ir.convenience.get_const_tensor(value)
        return (
            int(known.numpy().reshape(()))
            if known is not None
            else self.w.op("Reshape", value, self.w.ints(1))
        )

    def size(self, value: ir.Value, axis: int) -> Number:
        """A size of a value."""
        known = value.shape[axis] if value.shape is not None else None
        if isinstance(known, int):
            return known
        return self.w.op("Slice", self.w.op("Shape", value), *self._from(axis))

    def _from(self, axis: int) -> tuple[ir.Value, ir.Value]:
        return self.w.ints(axis), self.w.ints(axis + 1 if axis != -1 else 2**62)

    # Tables

    def angles(self, rows: Number, columns: Number, n: Number, *, many: bool = False) -> tuple[Any, Any]:
        """Cosines and sines of 2 pi jk / n, (rows, columns), in float64: constants as arrays, others as values.

        Args:
            rows: How many j.
            columns: How many k.
            n: Of a whole turn.
            many: Whether there are more entries than n, so that they are looked up in a table of n.
        """
        if isinstance(rows, int) and isinstance(columns, int) and isinstance(n, int):
            known = 2 * np.pi / n * (np.outer(np.arange(rows), np.arange(columns)) % n)
            return np.cos(known), np.sin(known)
        w = self.w
        index = w.op("Mod", w.op("Mul", self.count(rows, [1]), self.count(columns, [0])), self.tensor(n))
        unit = w.op(
            "Div", w.constant(np.array([2 * np.pi])), w.op("Cast", self.tensor(n), to=ir.DataType.DOUBLE)
        )
        if many:
            every = w.op("Mul", w.op("Cast", self.count(n, []), to=ir.DataType.DOUBLE), unit)
            return tuple(w.op("Gather", w.op(kind, every), index) for kind in ("Cos", "Sin"))  # type: ignore[return-value]
        turned = w.op("Mul", w.op("Cast", index, to=ir.DataType.DOUBLE), unit)
        return w.op("Cos", turned), w.op("Sin", turned)

    def chirp(self, count: Number, start: Number, n: Number) -> tuple[Any, Any]:
        """Cosines and sines of pi j^2 / n, (count,), in float64, for j from -start on."""
        if isinstance(count, int) and isinstance(start, int) and isinstance(n, int):
            known = np.pi / n * (np.square(np.arange(count) - start) % (2 * n))
            return np.cos(known), np.sin(known)
        w = self.w
        place = w.op("Sub", self.count(count, []), self.tensor(start))
        left = w.op("Mod", w.op("Mul", place, place), self.tensor(self.apply("Mul", n, 2)))
        unit = w.op("Div", w.constant(np.array([np.pi])), w.op("Cast", self.tensor(n), to=ir.DataType.DOUBLE))
        turned = w.op("Mul", w.op("Cast", left, to=ir.DataType.DOUBLE), unit)
        return w.op("Cos", turned), w.op("Sin", turned)

    def row(self, column: Any) -> Any:
        """A table (n, 1) as (1, n)."""
        return self.w.op("Transpose", column, perm=[1, 0]) if isinstance(column, ir.Value) else column.T

    def count(self, number: Number, axes: Sequence[int]) -> ir.Value:
        """0, 1, 2, ... in int64, with further axes of size 1."""
        w = self.w
        last = w.op("Squeeze", self.tensor(number), w.ints(0))
        return w.unsqueezed(w.op("Range", w.scalar(0), last, w.scalar(1)), axes)

    def times(self, value: Any, by: Any) -> Any:
        """A product of tables, or numbers."""
        if not isinstance(by, ir.Value) and np.ndim(by) == 0 and by == 1:
            return value
        if not isinstance(value, ir.Value) and not isinstance(by, ir.Value):
            return value * by
        return self.w.op("Mul", self.double(value), self.double(by))

    def double(self, value: Any) -> ir.Value:
        return value if isinstance(value, ir.Value) else self.w.constant(np.asarray(value, np.float64))

    def joined(self, parts: Sequence[Any], axis: int) -> Any:
        """Tables next to each other."""
        if any(isinstance(part, ir.Value) for part in parts):
            return self.w.op("Concat", *map(self.double, parts), axis=axis)
        return np.concatenate(parts, axis)

    def typed(self, table: Any, like: ir.Value) -> ir.Value:
        """A table in the type of a value."""
        assert like.dtype is not None
        if isinstance(table, ir.Value):
            found = self.w.op("Cast", table, to=like.dtype)
            found.type = ir.TensorType(like.dtype)
            return found
        return self.w.constant(table.astype(like.dtype.numpy()))

    def scale(self, n: Number, power: int) -> Any:
        """A power of 1 / sqrt(n)."""
        if isinstance(n, int):
            return float(n) ** (-power / 2)
        if not power:
            return 1.0
        wide = self.w.op("Cast", n, to=ir.DataType.DOUBLE)
        return self.w.op("Reciprocal", self.w.op("Sqrt", wide) if power == 1 else wide)

    # Tensors

    def cut(self, value: ir.Value, axis: int, start: Number, end: Number) -> ir.Value:
        w = self.w
        return w.op("Slice", value, self.tensor(start), self.tensor(end), w.ints(axis))

    def padded(self, value: ir.Value, missing: Number) -> ir.Value:
        """With zeros behind the last axis."""
        if isinstance(missing, int) and not missing:
            return value
        w = self.w
        assert value.dtype is not None
        ahead = w.op("Slice", w.op("Shape", value), w.ints(0), w.ints(-1))
        zero = ir.tensor(np.zeros(1, value.dtype.numpy()))
        shape = w.op("Concat", ahead, self.tensor(missing), axis=0)
        return w.op("Concat", value, w.op("ConstantOfShape", shape, value=zero), axis=-1)

    def split(self, value: ir.Value, sizes: Sequence[Number]) -> ir.Value:
        """The last axis as several."""
        w = self.w
        ahead = w.op("Slice", w.op("Shape", value), w.ints(0), w.ints(-1))
        return w.op("Reshape", value, w.op("Concat", ahead, *map(self.tensor, sizes), axis=0))


_ON_NUMBERS: dict[str, Callable[[int, int], int]] = {
    "Add": lambda one, other: one + other,
    "Sub": lambda one, other: one - other,
    "Mul": lambda one, other: one * other,
    "Div": lambda one, other: one // other,
    "Max": max,
    "Min": min,
}


def negative(t: Tables, value: Any) -> Any:
    return t.w.op("Neg", value) if isinstance(value, ir.Value) else -value


def twice_but_ends(t: Tables, rows: Number, n: Number) -> Any:
    """(rows, 1): 1 for the frequencies 0 and n / 2, which are their own conjugates, and 2 for others."""
    if isinstance(rows, int) and isinstance(n, int):
        known = np.arange(rows)[:, None]
        return np.where((known == 0) | (2 * known == n), 1.0, 2.0)
    w = t.w
    k = t.count(rows, [1])
    ends = w.op("Or", w.op("Equal", k, w.ints(0)), w.op("Equal", w.op("Mul", k, w.ints(2)), t.tensor(n)))
    return w.op("Where", ends, w.constant(np.array([1.0])), w.constant(np.array([2.0])))
