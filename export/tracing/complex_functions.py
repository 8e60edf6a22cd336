"""Functions of complex numbers in their parts, z = x + iy, r = |z|, a = angle(z).

exp z   e^x (cos y, sin y)          log z   (log r, a)          z^p   r^p (cos pa, sin pa)   for real p
|z|     s |z / s| with s = max(|x|, |y|), so that no square overflows or vanishes
angle   2 atan(y / (r + x)), or 2 atan((r - x) / y) where x < 0: neither subtracts what is nearly equal
"""

from __future__ import annotations

import cmath
import math
from functools import partial
from typing import Any

import torch
from torch import fx

from moe_export.export.tracing.complex_arithmetic import Rule, add, divide, multiply, reciprocal, square
from moe_export.export.tracing.complex_writer import Pair, Part, Writer, parts_of

_aten = torch.ops.aten
_MOST_SQUARINGS = 6  # of an integer power: more than 64 goes by the angle


def modulus(w: Writer, value: Any) -> fx.Node:
    """|z|."""
    real, imag = parts_of(value)
    if not isinstance(real, fx.Node) or not isinstance(imag, fx.Node):
        only = real if isinstance(real, fx.Node) else imag
        if real is None or imag is None:
            return w.call(_aten.abs.default, only)
        real, imag = w.whole(value)
    scale = w.call(_aten.maximum.default, w.call(_aten.abs.default, real), w.call(_aten.abs.default, imag))
    tiny = torch.finfo(scale.meta["val"].dtype).tiny
    by = w.call(_aten.clamp_min.default, scale, tiny)  # 0 / tiny is 0
    parts = [w.square(w.call(_aten.div.Tensor, part, by)) for part in (real, imag)]
    unit = w.call(_aten.sqrt.default, w.add(*parts))
    return w.call(_aten.mul.Tensor, unit, by)


def angle(w: Writer, value: Any) -> fx.Node:
    """The angle, in (-pi, pi]; 0 of 0."""
    real, imag = w.whole(value)
    if parts_of(value)[1] is None:
        turned = w.call(_aten.full_like.default, real, math.pi)
        return w.call(_aten.where.self, w.call(_aten.lt.Scalar, real, 0), turned, imag)
    size = modulus(w, Pair(real, imag))
    right = w.call(_aten.div.Tensor, imag, w.call(_aten.add.Tensor, size, real))
    left = w.call(_aten.div.Tensor, w.call(_aten.sub.Tensor, size, real), imag)
    half = w.call(_aten.where.self, w.call(_aten.lt.Scalar, real, 0), left, right)
    found = w.call(_aten.mul.Tensor, w.call(_aten.atan.default, half), 2)
    return w.call(_aten.where.self, w.call(_aten.eq.Scalar, size, 0), w.zeros(size), found)


def polar(w: Writer, size: Any, turned: Any, **_: Any) -> Pair:
    """R (cos a, sin a)."""
    return Pair(*(w.mul(size, w.call(each, turned)) for each in (_aten.cos.default, _aten.sin.default)))


def exponential(w: Writer, value: Any) -> Pair:
    """e^z."""
    real, imag = parts_of(value)
    if imag is None:
        return Pair(w.call(_aten.exp.default, real), None)
    if not isinstance(imag, fx.Node):
        imag = w.whole(value)[1]
    size: Part = None
    if isinstance(real, fx.Node):
        size = w.call(_aten.exp.default, real)
    elif real is not None:
        size = math.exp(real)
    return polar(w, 1 if size is None else size, imag)


def logarithm(w: Writer, value: Any) -> Pair:
    """Log z."""
    return Pair(w.call(_aten.log.default, modulus(w, value)), angle(w, value))


def square_root(w: Writer, value: Any) -> Pair:
    """The root whose real part is not negative: t = sqrt((r + |x|) / 2), and the other part is y / 2t."""
    real, imag = w.whole(value)
    size = modulus(w, Pair(real, imag))
    larger = w.call(
        _aten.sqrt.default, w.mul(w.call(_aten.add.Tensor, size, w.call(_aten.abs.default, real)), 0.5)
    )
    tiny = torch.finfo(size.meta["val"].dtype).tiny
    smaller = w.mul(w.call(_aten.div.Tensor, imag, w.call(_aten.clamp_min.default, larger, tiny)), 0.5)
    assert isinstance(smaller, fx.Node)
    is_left = w.call(_aten.lt.Scalar, real, 0)
    below = w.call(_aten.lt.Scalar, imag, 0)
    signed = w.call(_aten.where.self, below, w.neg(larger), larger)
    return Pair(
        w.call(_aten.where.self, is_left, w.call(_aten.abs.default, smaller), larger),
        w.call(_aten.where.self, is_left, signed, smaller),
    )


def power(w: Writer, base: Any, exponent: Any) -> Pair:
    """z^p: products where p is a small integer; by the angle where it is real; else e^(p log z)."""
    if isinstance(exponent, (int, float)):
        if exponent == int(exponent) and abs(exponent) < 2**_MOST_SQUARINGS:
            return _whole_power(w, base, int(exponent))
        if exponent == 0.5:
            return square_root(w, base)
    if isinstance(base, (int, float, complex)):
        if not base:
            w.refuse("a power of 0 with a complex exponent has no ONNX form")
        return exponential(w, multiply(w, exponent, cmath.log(base)))
    if isinstance(exponent, (Pair, complex)):
        return exponential(w, multiply(w, exponent, logarithm(w, base)))
    kind = _aten.pow.Tensor_Tensor if isinstance(exponent, fx.Node) else _aten.pow.Tensor_Scalar
    turned = w.mul(angle(w, base), exponent)
    return polar(w, w.call(kind, modulus(w, base), exponent), turned)


def _whole_power(w: Writer, base: Pair, exponent: int) -> Pair:
    if exponent < 0:
        return reciprocal(w, _whole_power(w, base, -exponent))
    if exponent == 0:
        real, _ = w.whole(base)
        return Pair(w.call(_aten.ones_like.default, real), None)
    found, squared = None, base
    for place in range(exponent.bit_length()):
        if place:
            squared = square(w, squared)
        if exponent >> place & 1:
            found = squared if found is None else multiply(w, found, squared)
    assert found is not None
    return found


def _turned(w: Writer, value: Any) -> Pair:
    """I z."""
    real, imag = parts_of(value)
    return Pair(w.neg(imag), real)


def hyperbolic(w: Writer, value: Any, *, odd: bool) -> Pair:
    """Sinh z = (sinh x cos y, cosh x sin y); cosh z = (cosh x cos y, sinh x sin y)."""
    real, imag = w.whole(value)
    by = (_aten.sinh.default, _aten.cosh.default) if odd else (_aten.cosh.default, _aten.sinh.default)
    turns = (_aten.cos.default, _aten.sin.default)
    return Pair(
        *(w.mul(w.call(one, real), w.call(other, imag)) for one, other in zip(by, turns, strict=True))
    )


def sine(w: Writer, value: Any) -> Pair:
    """Sin z = -i sinh(i z)."""
    real, imag = parts_of(hyperbolic(w, _turned(w, value), odd=True))
    return Pair(imag, w.neg(real))


def cosine(w: Writer, value: Any) -> Pair:
    """Cos z = cosh(i z)."""
    return hyperbolic(w, _turned(w, value), odd=False)


def tangent(w: Writer, value: Any) -> Pair:
    """Tanh z, by q = e^(-2|x|): (sign(x) (1 - q^2), 2 q sin 2y) / (1 + 2 q cos 2y + q^2)."""
    real, imag = w.whole(value)
    far = w.mul(w.call(_aten.abs.default, real), -2)
    assert isinstance(far, fx.Node)
    q = w.call(_aten.exp.default, far)
    lost = w.neg(w.call(_aten.expm1.default, w.mul(far, 2)))  # 1 - q^2
    twice = w.mul(imag, 2)
    cos, sin = (w.mul(w.mul(q, w.call(each, twice)), 2) for each in (_aten.cos.default, _aten.sin.default))
    below = w.add(w.add(w.square(q), cos), 1)
    parts = (w.mul(w.call(_aten.sign.default, real), lost), sin)
    return Pair(*(w.call(_aten.div.Tensor, part, below) for part in parts))


def sigmoid(w: Writer, value: Any) -> Pair:
    """(1 + tanh(z / 2)) / 2."""
    return multiply(w, add(w, tangent(w, multiply(w, value, 0.5)), 1), 0.5)


def direction(w: Writer, value: Any) -> Pair:
    """Z / |z|; 0 of 0."""
    size = modulus(w, value)
    one = w.call(_aten.ones_like.default, size)
    return divide(w, value, w.call(_aten.where.self, w.call(_aten.eq.Scalar, size, 0), one, size))


def by_modulus(target: Any, w: Writer, value: Any, *rest: Any, **kwargs: Any) -> fx.Node:
    """A norm: that of the moduli."""
    return w.call(target, modulus(w, value), *rest, **kwargs)


def either(target: Any, w: Writer, value: Any) -> fx.Node:
    """`isnan`, `isinf`: whether it is so of one part."""
    real, imag = w.whole(value)
    return w.call(_aten.logical_or.default, w.call(target, real), w.call(target, imag))


def finite(w: Writer, value: Any) -> fx.Node:
    """Whether both parts are finite."""
    real, imag = w.whole(value)
    return w.call(_aten.logical_and.default, *(w.call(_aten.isfinite.default, each) for each in (real, imag)))


def equal(w: Writer, one: Any, other: Any) -> fx.Node:
    """Whether both parts are equal."""
    found = []
    for pair in zip(parts_of(one), parts_of(other), strict=True):
        first, second = pair if isinstance(pair[0], fx.Node) else pair[::-1]
        if isinstance(first, fx.Node):
            kind = _aten.eq.Tensor if isinstance(second, fx.Node) else _aten.eq.Scalar
            found.append(w.call(kind, first, 0 if second is None else second))
    return found[0] if len(found) == 1 else w.call(_aten.logical_and.default, *found)


def unequal(w: Writer, one: Any, other: Any) -> fx.Node:
    """Whether a part differs."""
    return w.call(_aten.logical_not.default, equal(w, one, other))


RULES: dict[Any, Rule] = {
    _aten.abs.default: modulus,
    _aten.angle.default: angle,
    _aten.polar.default: polar,
    _aten.exp.default: exponential,
    _aten.log.default: logarithm,
    _aten.sqrt.default: square_root,
    _aten.rsqrt.default: lambda w, value: reciprocal(w, square_root(w, value)),
    **dict.fromkeys((_aten.pow.Tensor_Scalar, _aten.pow.Tensor_Tensor, _aten.pow.Scalar), power),
    _aten.sinh.default: partial(hyperbolic, odd=True),
    _aten.cosh.default: partial(hyperbolic, odd=False),
    _aten.sin.default: sine,
    _aten.cos.default: cosine,
    _aten.tanh.default: tangent,
    _aten.sigmoid.default: sigmoid,
    **dict.fromkeys((_aten.sgn.default, _aten.sign.default), direction),
    **{
        target: partial(by_modulus, target)
        for target in (_aten.linalg_vector_norm.default, _aten.norm.Scalar, _aten.norm.ScalarOpt_dim)
    },
    **{target: partial(either, target) for target in (_aten.isnan.default, _aten.isinf.default)},
    _aten.isfinite.default: finite,
    **dict.fromkeys((_aten.eq.Tensor, _aten.eq.Scalar), equal),
    **dict.fromkeys((_aten.ne.Tensor, _aten.ne.Scalar), unequal),
}
