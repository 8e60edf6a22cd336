"""Arithmetic of complex numbers in their parts: sums, products, quotients, and what is linear in two operands.

z w     (zr wr - zi wi,  zr wi + zi wr)         so for every product: matmul, einsum, convolution
z / w   z conj(v) / (|v|^2 s)   with s = max(|wr|, |wi|) and v = w / s, whose squares neither overflow nor vanish
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from moe_export.export.tracing.complex_writer import Pair, Part, Writer, parts_of

_aten = torch.ops.aten

Rule = Callable[..., Any]
"""`rule(writer, *args, **kwargs)` of an operator's arguments, complex ones as pairs → a pair, or a real node."""

_MOST_OPERANDS = (
    5  # complex ones of an einsum, of which twice as many products of parts are made for each more
)


def add(w: Writer, one: Any, other: Any, *, alpha: Any = 1) -> Pair:
    """`one + alpha * other`."""
    pairs = parts_of(one), _product(w, parts_of(other), parts_of(alpha))
    return Pair(*(w.add(*parts) for parts in zip(*pairs, strict=True)))


def subtract(w: Writer, one: Any, other: Any, *, alpha: Any = 1) -> Pair:
    """`one - alpha * other`."""
    pairs = parts_of(one), _product(w, parts_of(other), parts_of(alpha))
    return Pair(*(w.sub(*parts) for parts in zip(*pairs, strict=True)))


def subtract_from(w: Writer, one: Any, other: Any, alpha: Any = 1) -> Pair:
    """`other - alpha * one`."""
    return subtract(w, other, one, alpha=alpha)


def multiply(w: Writer, one: Any, other: Any) -> Pair:
    """The product, entry by entry."""
    return Pair(*_product(w, parts_of(one), parts_of(other)))


def _product(w: Writer, one: tuple[Part, Part], other: tuple[Part, Part]) -> tuple[Part, Part]:
    (a, b), (c, d) = one, other
    real = w.sub(w.mul(a, c), w.mul(b, d))
    imag = w.add(w.mul(a, d), w.mul(b, c))
    return (0.0 if real is None and imag is None else real), imag


def square(w: Writer, value: Any) -> Pair:
    """Z z: (x - y) (x + y) loses fewer digits than x x - y y where both are near."""
    real, imag = parts_of(value)
    if real is None or imag is None:
        return Pair(w.sub(w.square(real), w.square(imag)), None)
    twice = w.mul(w.mul(real, imag), 2)
    return Pair(w.mul(w.sub(real, imag), w.add(real, imag)), twice)


def divide(w: Writer, one: Any, other: Any) -> Pair:
    """The quotient, entry by entry."""
    c, d = parts_of(other)
    if d is None:
        return Pair(*(_quotient(w, part, c) for part in parts_of(one)))
    if not isinstance(c, fx.Node) and not isinstance(d, fx.Node):
        return multiply(w, one, 1 / complex(c or 0, d))
    if c is None:  # (a + bi) / di = b/d - (a/d) i
        a, b = parts_of(one)
        return Pair(_quotient(w, b, d), w.neg(_quotient(w, a, d)))
    c, d = w.whole(other)
    scale = w.call(_aten.maximum.default, w.call(_aten.abs.default, c), w.call(_aten.abs.default, d))
    unit = [w.call(_aten.div.Tensor, part, scale) for part in (c, d)]
    size = w.mul(w.add(w.square(unit[0]), w.square(unit[1])), scale)
    found = _product(w, parts_of(one), (unit[0], w.neg(unit[1])))
    return Pair(*(_quotient(w, part, size) for part in found))


def _quotient(w: Writer, part: Part, by: Part) -> Part:
    if part is None:
        return None
    if not isinstance(part, fx.Node):
        assert isinstance(by, fx.Node)
        return w.mul(w.call(_aten.reciprocal.default, by), part)
    return w.call(_aten.div.Tensor, part, by)


def reciprocal(w: Writer, value: Any) -> Pair:
    """1 / z."""
    return divide(w, 1.0, value)


def conjugate(w: Writer, value: Any) -> Pair:
    """(x, -y)."""
    real, imag = parts_of(value)
    return Pair(real, w.neg(imag))


# Products of other kinds


def bilinear(target: Any, w: Writer, one: Any, other: Any, *rest: Any, **kwargs: Any) -> Pair:
    """What is linear in its first two operands (`mm`, `matmul`, `outer`)."""

    def times(x: Part, y: Part) -> Part:
        return None if x is None or y is None else w.call(target, x, y, *rest, **kwargs)

    (a, b), (c, d) = parts_of(one), parts_of(other)
    return Pair(w.sub(times(a, c), times(b, d)), w.add(times(a, d), times(b, c)))


def of_conjugate(target: Any, w: Writer, one: Any, other: Any, *rest: Any, **kwargs: Any) -> Pair:
    """`vdot` and the like, which take the conjugate of their first operand; `target` does so with none."""
    return bilinear(target, w, conjugate(w, one) if isinstance(one, Pair) else one, other, *rest, **kwargs)


def with_bias(target: Any, w: Writer, one: Any, other: Any, bias: Any = None, *rest: Any) -> Pair:
    """`linear` and convolutions: a product, and a third operand that is added to each entry."""
    found = bilinear(target, w, one, other, None, *rest)
    if bias is None:
        return found
    real, imag = parts_of(bias)
    axes = [1] * (0 if target is _aten.linear.default else w.node.meta["val"].dim() - 2)

    def shaped(part: Part) -> Part:
        return w.call(_aten.reshape.default, part, [-1, *axes]) if axes and part is not None else part

    return Pair(w.add(found.real, shaped(real)), w.add(found.imag, shaped(imag)))


def added_product(
    target: Any, w: Writer, added: Any, one: Any, other: Any, *, beta: Any = 1, alpha: Any = 1
) -> Pair:
    """`addmm` and the like: `beta * added + alpha * product`."""
    product = multiply(w, bilinear(target, w, one, other), alpha)
    return add(w, multiply(w, added, beta), product)


def added_multiple(w: Writer, added: Any, one: Any, other: Any, *, value: Any = 1) -> Pair:
    """`addcmul`."""
    return add(w, added, multiply(w, multiply(w, one, other), value))


def einsum(w: Writer, equation: str, operands: Sequence[Any], *, path: Any = None) -> Pair:
    """The sum over all ways to take one part of each operand; i i = -1, so signs follow how many imaginary ones."""
    if sum(isinstance(operand, Pair) for operand in operands) > _MOST_OPERANDS:
        w.refuse(f"an einsum of more than {_MOST_OPERANDS} complex operands has no ONNX form")
    found: list[Part] = [None, None]
    for chosen in itertools.product((0, 1), repeat=len(operands)):
        parts = [parts_of(operand)[which] for operand, which in zip(operands, chosen, strict=True)]
        if None not in parts:
            imaginary = sum(chosen)
            term = w.call(_aten.einsum.default, equation, parts)
            combine = w.sub if imaginary % 4 in (2, 3) else w.add
            found[imaginary % 2] = combine(found[imaginary % 2], term)
    return Pair(*found)


def _table(rule: Rule, *targets: Any) -> dict[Any, Rule]:
    return {target: partial(rule, target) for target in targets}


RULES: dict[Any, Rule] = {
    **dict.fromkeys((_aten.add.Tensor, _aten.add.Scalar), add),
    **dict.fromkeys((_aten.sub.Tensor, _aten.sub.Scalar), subtract),
    **dict.fromkeys((_aten.rsub.Tensor, _aten.rsub.Scalar), subtract_from),
    **dict.fromkeys((_aten.mul.Tensor, _aten.mul.Scalar), multiply),
    **dict.fromkeys((_aten.div.Tensor, _aten.div.Scalar, _aten.true_divide.Tensor), divide),
    _aten.reciprocal.default: reciprocal,
    _aten.square.default: square,
    **dict.fromkeys(
        (_aten._conj.default, _aten.conj.default, _aten._conj_physical.default, _aten.conj_physical.default),
        conjugate,
    ),
    **_table(
        bilinear,
        *(_aten.mm.default, _aten.bmm.default, _aten.matmul.default, _aten.mv.default, _aten.dot.default),
        *(_aten.outer.default, _aten.ger.default, _aten.inner.default, _aten.kron.default),
        _aten.tensordot.default,
    ),
    _aten.vdot.default: partial(of_conjugate, _aten.dot.default),
    **_table(
        with_bias,
        *(_aten.linear.default, _aten.convolution.default),
        *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    ),
    _aten.addmm.default: partial(added_product, _aten.mm.default),
    _aten.baddbmm.default: partial(added_product, _aten.bmm.default),
    _aten.addmv.default: partial(added_product, _aten.mv.default),
    _aten.addr.default: partial(added_product, _aten.outer.default),
    _aten.addcmul.default: added_multiple,
    _aten.einsum.default: einsum,
}
