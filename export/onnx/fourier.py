"""Fourier transforms and convolutions (`tracing.fourier`) as matrix products, exact to a few roundings of float32.

    transform     X = x C + i x S      C[j, k] = cos(2 pi jk / n), S likewise, by the exact remainder of jk by n
    convolution   by a transform of N = 32 p >= |a| + |b| - 1 entries in two products, whatever the length is:

        x[j1, j2] = x[32 j1 + j2]      u[k1, j2] = sum_j1 e^(-2 pi i j1 k1 / p) x[j1, j2]
        X[k1, k2] of frequency k1 + p k2 = sum_j2 e^(-2 pi i j2 k2 / 32) e^(-2 pi i k1 j2 / N) u[k1, j2]

    x being real, k1 <= p / 2 says it all; and as the order of frequencies is of no matter between a transform and its
    inverse, nothing is transposed.

ONNX's `DFT` is not used: ONNX Runtime's is off by 1e-4 of the largest value at n = 1000, TensorRT has none, and it is
slower (docs/complex.md).

Letters: n entries of a transform, N of a padded one of p rows and q = 32 columns, r = p / 2 + 1, h rows that are not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript.values import Op, Opset

from moe_export.export.tracing.fourier import CONVOLVE, FOURIER, FOURIER_REAL
from moe_export.graph_builder import GraphBuilder

DOMAIN = "moe_export.fourier"
_Q = 32  # columns: from 64 to 4096 entries no other power of two is faster
_LARGEST = 2**20  # entries of a table that is stored; a larger one is computed in the graph

Number = int | ir.Value
"""A size: one that is fixed, or (1,) of int64."""


# What the translation writes


def _operator(name: str, operands: Sequence[str], numbers: Sequence[str], attributes: Sequence[str]) -> Op:
    parameter, option = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption

    def of(kind: str, each: str) -> Any:
        return parameter(each, kind, param_option=option.Optional if each == "imag" else option.Single)

    integer = onnx.defs.OpSchema.AttrType.INT
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[*(of("T", each) for each in operands), *(of("tensor(int64)", each) for each in numbers)],
        outputs=[of("T", "found")],
        type_constraints=[
            ("T", [f"tensor({each})" for each in ("float16", "bfloat16", "float", "double")], "")
        ],
        attributes=[onnx.defs.OpSchema.Attribute(each, integer, required=True) for each in attributes],
    )
    return Op(Opset(DOMAIN, 1), name, schema)


_TRANSFORM = _operator("Transform", ("real", "imag"), ("n",), ("onesided", "inverse", "power"))
_TO_REAL = _operator("ToReal", ("real", "imag"), ("n",), ("power",))
_CONVOLUTION = _operator("Convolution", ("a", "b"), ("n", "length"), ("wraps",))


def _transform(real: Any, imag: Any, n: Any, onesided: bool, inverse: bool, power: int) -> Any:
    return _TRANSFORM(real, imag, n, onesided=int(onesided), inverse=int(inverse), power=power)


def _to_real(real: Any, imag: Any, n: Any, power: int) -> Any:
    return _TO_REAL(real, imag, n, power=power)


def _convolution(a: Any, b: Any, n: Any, length: Any, wraps: bool) -> Any:
    return _CONVOLUTION(a, b, n, length, wraps=int(wraps))


TRANSLATIONS: dict[Any, Any] = {FOURIER: _transform, FOURIER_REAL: _to_real, CONVOLVE: _convolution}


# What these become


def expand_fourier(model: ir.Model) -> None:
    """Replace every such node by the products that compute it, in place."""
    for node in list(model.graph.all_nodes()):
        if node.domain == DOMAIN:
            found = _FORMS[node.op_type](_Tables(GraphBuilder.in_front_of(node, str(node.name))), node)
            found.shape, found.type = node.outputs[0].shape, node.outputs[0].type
            node.outputs[0].replace_all_uses_with(found, replace_graph_outputs=True)
            assert node.graph is not None
            node.graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)


class _Tables:
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

    def count(self, number: Number, axes: Sequence[int]) -> ir.Value:
        """0, 1, 2, ... in int64, with further axes of size 1."""
        w = self.w
        last = w.op("Squeeze", self.tensor(number), w.ints(0))
        return w.unsqueezed(w.op("Range", w.scalar(0), last, w.scalar(1)), axes)

    def times(self, value: Any, by: Any) -> Any:
        """A product of tables, or numbers."""
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
            return self.w.op("Cast", table, to=like.dtype)
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

    def padded(self, value: ir.Value, rank: int, missing: Number) -> ir.Value:
        """With zeros behind the last axis."""
        if isinstance(missing, int) and not missing:
            return value
        w = self.w
        ahead = w.constant(np.zeros(2 * rank - 1, np.int64))
        return w.op("Pad", value, w.op("Concat", ahead, self.tensor(missing), axis=0))

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


def _expand_transform(t: _Tables, node: ir.Node) -> ir.Value:
    real, imag, n = node.inputs[0], node.inputs[1], t.given(node.inputs[2])
    assert real is not None
    onesided, inverse, power = (node.attributes[key].as_int() for key in ("onesided", "inverse", "power"))
    kept = t.apply("Add", t.apply("Div", n, 2), 1) if onesided else n
    cos, sin = _stored(t, t.size(real, -1), kept, n)
    scale = t.scale(n, power)
    cos, sin = t.times(cos, scale), t.times(sin, scale if inverse else _negative(t, scale))
    found = t.w.op("MatMul", real, t.typed(t.joined((cos, sin), -1), real))
    if imag is not None:
        turned = t.typed(t.joined((_negative(t, sin), cos), -1), real)
        found = t.w.op("Add", found, t.w.op("MatMul", imag, turned))
    return found


def _negative(t: _Tables, value: Any) -> Any:
    return t.w.op("Neg", value) if isinstance(value, ir.Value) else -value


def _stored(t: _Tables, rows: Number, columns: Number, n: Number) -> tuple[Any, Any]:
    """Tables that are stored unless they are large."""
    if isinstance(rows, int) and isinstance(columns, int) and rows * columns > _LARGEST:
        n = t.tensor(n)
    return t.angles(rows, columns, n, many=True)


def _expand_to_real(t: _Tables, node: ir.Node) -> ir.Value:
    real, imag, n = node.inputs[0], node.inputs[1], t.given(node.inputs[2])
    assert real is not None
    rows = t.size(real, -1)
    cos, sin = _stored(t, rows, n, n)
    counted = _twice_but_ends(t, rows, n)
    scale = t.times(counted, t.scale(n, node.attributes["power"].as_int()))
    found = t.w.op("MatMul", real, t.typed(t.times(cos, scale), real))
    if imag is not None:
        found = t.w.op("Sub", found, t.w.op("MatMul", imag, t.typed(t.times(sin, scale), real)))
    return found


def _twice_but_ends(t: _Tables, rows: Number, n: Number) -> Any:
    """(rows, 1): 1 for the frequencies 0 and n / 2, which are their own conjugates, and 2 for others."""
    if isinstance(rows, int) and isinstance(n, int):
        known = np.arange(rows)[:, None]
        return np.where((known == 0) | (2 * known == n), 1.0, 2.0)
    w = t.w
    k = t.count(rows, [1])
    ends = w.op("Or", w.op("Equal", k, w.ints(0)), w.op("Equal", w.op("Mul", k, w.ints(2)), t.tensor(n)))
    return w.op("Where", ends, w.constant(np.array([1.0])), w.constant(np.array([2.0])))


# Convolutions


def _expand_convolution(t: _Tables, node: ir.Node) -> ir.Value:
    a, b, n, length = node.inputs[0], node.inputs[1], t.given(node.inputs[2]), t.given(node.inputs[3])
    assert a is not None
    assert b is not None
    wraps = node.attributes["wraps"].as_int()
    sizes = [t.size(value, -1) for value in (a, b)]
    needed = t.apply("Max", t.apply("Sub", t.apply("Add", *sizes), 1), length)
    p = t.apply("Mul", t.up(needed, 2 * _Q), 2)
    padded = _Padded(t, p, a)
    spectra = [padded.spectrum(value, size) for value, size in zip((a, b), sizes, strict=True)]
    product = _times(t, *spectra)
    rank = max(len(value.shape) for value in (a, b) if value.shape is not None)
    if not wraps:
        return t.cut(padded.signal(product, t.up(length, _Q)), -1, 0, length)
    whole = padded.signal(product, p)
    behind = t.cut(whole, -1, n, t.apply("Add", n, length))
    missing = t.apply("Sub", length, t.size(behind, -1))
    return t.w.op("Add", t.cut(whole, -1, 0, length), t.padded(behind, rank, missing))


def _times(t: _Tables, one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[ir.Value, ir.Value]:
    """The product of complex numbers."""
    (a, b), (c, d) = one, other
    real = t.w.op("Sub", t.w.op("Mul", a, c), t.w.op("Mul", b, d))
    return real, t.w.op("Add", t.w.op("Mul", a, d), t.w.op("Mul", b, c))


class _Padded:
    """A transform of 32 p entries, its frequencies as rows and columns."""

    def __init__(self, t: _Tables, p: Number, like: ir.Value) -> None:
        self._t, self._p, self._like = t, p, like
        self._r = t.apply("Add", t.apply("Div", p, 2), 1)
        cos, sin = t.angles(self._r, _Q, t.apply("Mul", p, _Q))
        self._turn = t.typed(cos, like), t.typed(_negative(t, sin), like)
        self._back = self._turn[0], t.typed(sin, like)
        cos, sin = t.angles(_Q, _Q, _Q)
        self._along = t.typed(np.block([[cos, -sin], [sin, cos]]), like)
        self._along_back = t.typed(np.block([[cos, sin], [-sin, cos]]), like)
        self._rows: dict[Any, ir.Value] = {}

    def spectrum(self, value: ir.Value, size: Number) -> tuple[ir.Value, ir.Value]:
        """(…, size) → both parts, (…, r, 32)."""
        t, h = self._t, self._t.up(size, _Q)
        rank = len(value.shape or ())
        folded = t.split(t.padded(value, rank, t.apply("Sub", t.apply("Mul", h, _Q), size)), (h, _Q))
        if h not in self._rows:
            cos, sin = t.angles(self._r, h, self._p)
            self._rows[h] = t.typed(t.joined((cos, _negative(t, sin)), 0), self._like)
        both = t.w.op("MatMul", self._rows[h], folded)  # (…, 2r, 32)
        twice = t.apply("Mul", self._r, 2)
        parts = t.cut(both, -2, 0, self._r), t.cut(both, -2, self._r, twice)
        return self._columns(_times(t, parts, self._turn), self._along)

    def _columns(self, parts: Sequence[ir.Value], table: ir.Value) -> tuple[ir.Value, ir.Value]:
        found = self._t.w.op("MatMul", self._t.w.op("Concat", *parts, axis=-1), table)  # (…, r, 64)
        return self._t.cut(found, -1, 0, _Q), self._t.cut(found, -1, _Q, 2 * _Q)

    def signal(self, parts: tuple[ir.Value, ir.Value], rows: Number) -> ir.Value:
        """Both parts, (…, r, 32), of a real signal's spectrum → its first entries, (…, 32 rows)."""
        t, w = self._t, self._t.w
        turned = _times(t, self._columns(parts, self._along_back), self._back)
        cos, sin = t.angles(rows, self._r, self._p)
        counted = _twice_but_ends(t, self._r, self._p)
        counted = w.op("Transpose", counted, perm=[1, 0]) if isinstance(counted, ir.Value) else counted.T
        scale = t.times(counted, t.scale(t.apply("Mul", self._p, _Q), 2))
        table = t.joined((t.times(cos, scale), t.times(_negative(t, sin), scale)), -1)
        found = w.op("MatMul", t.typed(table, self._like), w.op("Concat", *turned, axis=-2))  # (…, rows, 32)
        ahead = w.op("Slice", w.op("Shape", found), w.ints(0), w.ints(-2))
        return w.op("Reshape", found, w.op("Concat", ahead, w.ints(-1), axis=0))


_FORMS: dict[str, Callable[[_Tables, ir.Node], ir.Value]] = {
    "Transform": _expand_transform,
    "ToReal": _expand_to_real,
    "Convolution": _expand_convolution,
}
