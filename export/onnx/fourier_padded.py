"""`Padded`: a transform of 32 p entries in two products, by which convolutions and transforms of any size are written.

    x[j1, j2] = x[32 j1 + j2]      u[k1, j2] = sum_j1 e^(-2 pi i j1 k1 / p) x[j1, j2]
    X[k1, k2] of frequency k1 + p k2 = sum_j2 e^(-2 pi i j2 k2 / 32) e^(-2 pi i k1 j2 / N) u[k1, j2]

x being real, k1 <= p / 2 says it all; and as the order of frequencies is of no matter between a transform and its
inverse, nothing is transposed.

    convolution                          N >= |a| + |b| - 1
    X[k] = sum_j x[j] e^(2 pi i jk / n)  jk = (j^2 + k^2 - (k - j)^2) / 2, so with c[j] = e^(pi i j^2 / n) it is
                                         c[k] sum_j (c[j] x[j]) conj(c[k - j]), a convolution (Bluestein)

Letters: n entries of a transform, N of a padded one of p rows and 32 columns, r = p / 2 + 1, h rows that are not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.export.onnx.fourier_tables import Number, Tables, negative, twice_but_ends

_Q = 32  # columns: from 64 to 4096 entries no other power of two is faster


def expand_convolution(t: Tables, node: ir.Node) -> ir.Value:
    a, b = node.inputs[:2]
    *sizes, n, length = map(t.given, node.inputs[2:])
    assert a is not None
    assert b is not None
    wraps = node.attributes["wraps"].as_int()
    needed = t.apply("Max", t.apply("Sub", t.apply("Add", *sizes), 1), length)
    p = t.apply("Mul", t.up(needed, 2 * _Q), 2)
    padded = Padded(t, p, a)
    spectra = [padded.spectrum(value, size) for value, size in zip((a, b), sizes, strict=True)]
    product = _times(t, *spectra)
    if not wraps:
        return t.cut(padded.signal(product, t.up(length, _Q)), -1, 0, length)
    whole = padded.signal(product, p)
    behind = t.cut(whole, -1, n, t.apply("Add", n, length))
    missing = t.apply("Sub", length, t.size(behind, -1))
    return t.w.op("Add", t.cut(whole, -1, 0, length), t.padded(behind, missing))


def _times(t: Tables, one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[ir.Value, ir.Value]:
    """The product of complex numbers."""
    (a, b), (c, d) = one, other
    real = t.w.op("Sub", t.w.op("Mul", a, c), t.w.op("Mul", b, d))
    return real, t.w.op("Add", t.w.op("Mul", a, d), t.w.op("Mul", b, c))


class Padded:
    """A transform of 32 p entries, its frequencies as rows and columns."""

    def __init__(self, t: Tables, p: Number, like: ir.Value) -> None:
        self._t, self._p, self._like = t, p, like
        self._r = t.apply("Add", t.apply("Div", p, 2), 1)
        cos, sin = t.angles(self._r, _Q, t.apply("Mul", p, _Q))
        self._turn = t.typed(cos, like), t.typed(negative(t, sin), like)
        self._back = self._turn[0], t.typed(sin, like)
        cos, sin = t.angles(_Q, _Q, _Q)
        self._along = t.typed(np.block([[cos, -sin], [sin, cos]]), like)
        self._along_back = t.typed(np.block([[cos, sin], [-sin, cos]]), like)
        self._rows: dict[Any, ir.Value] = {}

    def spectrum(self, value: ir.Value, size: Number) -> tuple[ir.Value, ir.Value]:
        """(…, size) → both parts, (…, r, 32)."""
        t, h = self._t, self._t.up(size, _Q)
        folded = t.split(t.padded(value, t.apply("Sub", t.apply("Mul", h, _Q), size)), (h, _Q))
        if h not in self._rows:
            cos, sin = t.angles(self._r, h, self._p)
            self._rows[h] = t.typed(t.joined((cos, negative(t, sin)), 0), self._like)
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
        counted = twice_but_ends(t, self._r, self._p)
        scale = t.times(t.row(counted), t.scale(t.apply("Mul", self._p, _Q), 2))
        table = t.joined((t.times(cos, scale), t.times(negative(t, sin), scale)), -1)
        found = w.op("MatMul", t.typed(table, self._like), w.op("Concat", *turned, axis=-2))  # (…, rows, 32)
        ahead = w.op("Slice", w.op("Shape", found), w.ints(0), w.ints(-2))
        return w.op("Reshape", found, w.op("Concat", ahead, w.ints(-1), axis=0))


@dataclass(frozen=True)
class Turn:
    """The sign and the unit of the angles of a transform: e^(2 pi i jk / n) if it is inverse, else the conjugate."""

    n: Number
    inverse: bool


def chirped(
    t: Tables,
    parts: tuple[ir.Value, ir.Value | None],
    rows: Number,
    turn: Turn,
    kept: Number,
    scale: Any,
) -> tuple[ir.Value, ir.Value]:
    """A transform along the last axis as a convolution.

    Args:
        t: The tables.
        parts: Of what is transformed; None for 0.
        rows: How many entries it has.
        turn: By which angles.
        kept: How many frequencies.
        scale: A number to multiply with, in float64.

    Returns:
        Both parts of the spectrum.
    """
    like = parts[0]
    before = t.apply("Sub", rows, 1)
    size = t.apply("Add", before, kept)

    def turns(count: Number, start: Number, *, back: bool, by: Any = 1.0) -> tuple[ir.Value, ir.Value]:
        cos, sin = t.chirp(count, start, turn.n)
        sin = sin if turn.inverse != back else negative(t, sin)
        return t.typed(t.times(cos, by), like), t.typed(t.times(sin, by), like)

    given = _turned(t, parts, turns(rows, 0, back=False))
    padded = Padded(t, t.apply("Mul", t.up(size, 2 * _Q), 2), like)
    a, b = (padded.spectrum(part, rows) for part in given)
    c, d = (padded.spectrum(part, size) for part in turns(size, before, back=True))
    products = (
        _sum(t, "Sub", _times(t, a, c), _times(t, b, d)),
        _sum(t, "Add", _times(t, a, d), _times(t, b, c)),
    )
    found = [t.cut(padded.signal(each, t.up(size, _Q)), -1, before, size) for each in products]
    return _times(t, (found[0], found[1]), turns(kept, 0, back=False, by=scale))


def _turned(
    t: Tables, parts: tuple[ir.Value, ir.Value | None], by: tuple[ir.Value, ir.Value]
) -> tuple[ir.Value, ir.Value]:
    real, imag = parts
    if imag is not None:
        return _times(t, (real, imag), by)
    return t.w.op("Mul", real, by[0]), t.w.op("Mul", real, by[1])


def _sum(t: Tables, kind: str, one: Sequence[Any], other: Sequence[Any]) -> tuple[ir.Value, ir.Value]:
    return t.w.op(kind, one[0], other[0]), t.w.op(kind, one[1], other[1])
