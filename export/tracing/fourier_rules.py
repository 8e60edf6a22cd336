"""Fourier transforms of `torch.fft` in parts, and convolutions that are written as products of spectra.

    rfft(x, n) ─▶ Spectrum(x, n)        irfft(Spectrum(x, n) * Spectrum(k, n), n) ─▶ convolve(x, k, n)
    abs(Spectrum(x, n)) ─▶ its parts, as `fourier` gives them

A spectrum remembers the signal that it is of, and what is done to spectra that has a meaning for signals is done to
these. Only where a spectrum itself is looked at is it computed. So a convolution stays one, of any length, and whoever
writes it down may choose how: a transform of another length, which must be no divisor of anything, does as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from moe_export.export.sizes import is_at_most, same_size
from moe_export.export.tracing.complex_arithmetic import Rule, bilinear, conjugate
from moe_export.export.tracing.complex_parts import alike
from moe_export.export.tracing.complex_writer import Pair, Part, Writer, parts_of
from moe_export.export.tracing.fourier import CONVOLVE, FOURIER, FOURIER_REAL

_aten = torch.ops.aten
_BACKWARD = {None: 0, "backward": 0, "ortho": 1, "forward": 2}
"""By the name of a norm: the power of 1 / sqrt(n) that a transform is scaled by; an inverse one by the rest to 2."""


@dataclass(frozen=True)
class Convolved:
    """The signal of a product of spectra, n long, which is only written once it is known how much of it is read."""

    one: Pair
    other: Pair
    n: Any

    def upto(self, w: Writer, length: Any) -> Pair:
        """Its first entries."""
        sizes = [_tensor(each).meta["val"].shape[-1] for each in (self.one, self.other)]
        wraps = not is_at_most(sum(sizes) - 1, _value(self.n))
        return bilinear(CONVOLVE, w, self.one, self.other, self.n, length, wraps)


@dataclass(frozen=True)
class Of:
    """What a spectrum is of.

    Attributes:
        of: A signal along its last axis.
        n: Of how many frequencies it is; the signal is no longer.
        axis: Where the frequencies are, counted from the end: -1 for the last axis.
        onesided: Whether it ends at n // 2, the signal being real.
        power: Of 1 / sqrt(n), by which it is scaled.
    """

    of: Pair | Convolved
    n: Any
    axis: int
    onesided: bool
    power: int

    @property
    def rank(self) -> int:
        """How many axes it has."""
        ones = (self.of.one, self.of.other) if isinstance(self.of, Convolved) else (self.of,)
        return max(_tensor(each).meta["val"].dim() for each in ones)

    def signal(self, w: Writer) -> Pair:
        """The signal itself."""
        return self.of.upto(w, self.n) if isinstance(self.of, Convolved) else self.of

    def like(self, other: Of) -> bool:
        """Whether entries of two spectra with the same index have the same frequency."""
        same = _same(self.n, other.n)
        return same and self.axis == other.axis and self.onesided == other.onesided


class Spectrum(Pair):
    """A spectrum, whose parts are computed when they are asked for."""

    def __init__(self, of: Of, compute: Callable[[], tuple[Part, Part]]) -> None:
        super().__init__(None, None)
        self.of = of
        self._compute = compute
        self._known: tuple[Part, Part] | None = None

    @property
    def parts(self) -> tuple[Part, Part]:
        if self._known is None:
            self._known = self._compute()
        return self._known


def _value(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, fx.Node) else size


def _same(one: Any, other: Any) -> bool:
    return same_size(_value(one), _value(other))


def _axis(value: Any, axis: int) -> int:
    """An axis, counted from the end."""
    rank = _rank(value)
    return axis % rank - rank


def _rank(value: Any) -> int:
    if isinstance(value, Spectrum):
        return value.of.rank
    return int(_tensor(value).meta["val"].dim())


def _tensor(value: Any) -> fx.Node:
    return next(part for part in parts_of(value) if isinstance(part, fx.Node))


def _moved(w: Writer, value: Any, source: int, target: int) -> Pair:
    """A value with one of its axes elsewhere, both counted from the end."""
    pair = Pair(*parts_of(value))
    if source == target:
        return pair
    rank = _tensor(pair).meta["val"].dim()
    order = [axis for axis in range(rank) if axis != source % rank]
    order.insert(target % rank, source % rank)
    return alike(_aten.permute.default, (0,), w, pair, order)


def _cut(w: Writer, value: Pair, size: Any) -> Pair:
    """A value with at most this many entries along its last axis."""
    there = _tensor(value).meta["val"].shape[-1]
    if is_at_most(there, _value(size)):
        return value
    return alike(_aten.slice.Tensor, (0,), w, value, -1, 0, size)


# One transform along one axis


def transform(
    w: Writer, value: Any, n: Any, axis: int, *, inverse: bool = False, onesided: bool = False, power: int = 0
) -> Spectrum:
    """The spectrum along an axis.

    Args:
        w: The writer.
        value: A pair or a real tensor.
        n: Of how many entries; None for those that there are.
        axis: Along which.
        inverse: Whether with the other sign; it is not scaled by 1 / n for that.
        onesided: Whether to stop at n // 2.
        power: Of 1 / sqrt(n), to scale by.
    """
    axis = _axis(value, axis)
    signal = _moved(w, value, axis, -1)
    n = w.size(_tensor(signal), -1) if n is None else n
    signal = _cut(w, signal, n)

    def compute() -> tuple[Part, Part]:
        kept = w.number(operator.add, w.number(operator.floordiv, n, 2), 1) if onesided else n
        real, imag = w.whole(signal) if signal.real is None else signal.parts
        both = w.call(FOURIER, real, imag, n, onesided, inverse, power)
        twice = w.number(operator.mul, kept, 2)
        parts = Pair(
            w.call(_aten.slice.Tensor, both, -1, 0, kept), w.call(_aten.slice.Tensor, both, -1, kept, twice)
        )
        return _moved(w, parts, -1, axis).parts

    return Spectrum(Of(signal, n, axis, onesided, power), compute)


def inverse(w: Writer, value: Any, n: Any, axis: int, power: int) -> Pair:
    """`ifft` along an axis, scaled by a power of 1 / sqrt(n)."""
    known = isinstance(value, Spectrum) and not value.of.onesided and value.of.axis == _axis(value, axis)
    signal = _signal(w, value.of, power) if known and (n is None or _same(n, value.of.n)) else None
    if signal is not None:
        return signal
    found = transform(w, value, n, axis, inverse=True, power=power)
    return Pair(*found.parts)


def inverse_real(w: Writer, value: Any, n: Any, axis: int, power: int) -> fx.Node:
    """`irfft` along an axis, scaled by a power of 1 / sqrt(n)."""
    axis = _axis(value, axis)
    known = isinstance(value, Spectrum) and value.of.onesided and value.of.axis == axis
    signal = _signal(w, value.of, power) if known and n is not None and _same(n, value.of.n) else None
    if signal is not None:
        return _tensor(signal)
    pair = _moved(w, value, axis, -1)
    if n is None:
        n = w.number(operator.mul, w.number(operator.sub, w.size(_tensor(pair), -1), 1), 2)
    pair = _cut(w, pair, w.number(operator.add, w.number(operator.floordiv, n, 2), 1))
    real, imag = w.whole(pair) if pair.real is None else pair.parts
    found = w.call(FOURIER_REAL, real, imag, n, power)
    return _tensor(_moved(w, found, -1, axis))


def _signal(w: Writer, of: Of, power: int) -> Pair | None:
    """The signal of a spectrum, as an inverse transform with this scale gives it."""
    scale = of.power + power - 2  # the power of 1 / sqrt(n) that remains
    if scale % 2:
        return None
    found = of.of.upto(w, _read(w.node, of)) if isinstance(of.of, Convolved) else _filled_up(w, of.of, of.n)
    for _ in range(abs(scale) // 2):
        by = _aten.div.Tensor if scale > 0 else _aten.mul.Tensor
        found = alike(by, (0,), w, found, of.n)
    return _moved(w, found, -1, of.axis)


def _read(node: fx.Node, of: Of) -> Any:
    """How many entries of an inverse transform are read, where all of its readers cut it off at the same place."""
    ends = set()
    for user in node.users:
        if user.target is not _aten.slice.Tensor or len(user.args) < 4:
            return of.n
        _, axis, start, end, *step = user.args
        if start not in (None, 0) or step not in ([], [1]) or _axis(node, axis) != of.axis:
            return of.n
        ends.add(end)
    end = ends.pop() if len(ends) == 1 else None
    if isinstance(end, fx.Node):
        return end if end < node and is_at_most(end.meta["val"], _value(of.n)) else of.n
    return end if isinstance(end, int) and end >= 0 and is_at_most(end, _value(of.n)) else of.n


# What is done to spectra, done to signals


def on_signals(rule: Rule, target: Any, w: Writer, *args: Any, **kwargs: Any) -> Any:
    """An operator on complex numbers; of spectra whose signals it means something for, it is done to these.

    Args:
        rule: The operator's rule for parts.
        target: The operator.
        w: The writer.
        args: Of the operator.
        kwargs: Likewise.
    """
    of = _SIGNALS[target](w, target, *args, **kwargs)
    if of is None:
        return rule(w, *args, **kwargs)
    value = w.node.meta["val"]
    return Spectrum(of, lambda: w.fitted(rule(w, *args, **kwargs), value).parts)


def _product(w: Writer, target: Any, one: Any, other: Any) -> Of | None:
    if not isinstance(one, Spectrum) or not isinstance(other, Spectrum):
        return _scaled(w, target, *((one, other) if isinstance(one, Spectrum) else (other, one)))
    if not one.of.like(other.of):
        return None
    found = Convolved(one.of.signal(w), other.of.signal(w), one.of.n)
    return replace(one.of, of=found, power=one.of.power + other.of.power)


def _scaled(w: Writer, target: Any, spectrum: Any, by: Any) -> Of | None:
    """A spectrum times a real number, or real numbers that are the same for all frequencies; or divided by them."""
    if not isinstance(spectrum, Spectrum) or isinstance(by, (Pair, complex)):
        return None
    of = spectrum.of
    value = by.meta["val"] if isinstance(by, fx.Node) else by
    if isinstance(value, torch.Tensor) and value.dim():
        if value.dim() >= -of.axis and not _same(value.shape[of.axis], 1):
            return None
        rank = max(value.dim(), -of.axis)
        by = _moved(w, alike(_aten.reshape.default, (0,), w, by, _leading(w, by, rank)), of.axis, -1)
        by = _tensor(by)
    signal = of.signal(w)
    return replace(
        of, of=Pair(*(part if part is None else w.call(target, part, by) for part in signal.parts))
    )


def _leading(w: Writer, value: fx.Node, rank: int) -> list[Any]:
    """A shape with axes of size 1 in front, up to a rank."""
    there = value.meta["val"].dim()
    return [1] * (rank - there) + [w.size(value, axis) for axis in range(there)]


def _sum(w: Writer, target: Any, one: Any, other: Any, *, alpha: Any = 1) -> Of | None:
    if not isinstance(one, Spectrum) or not isinstance(other, Spectrum) or not one.of.like(other.of):
        return None
    if alpha != 1 or one.of.power != other.of.power:
        return None
    signals = [each.of.signal(w) for each in (one, other)]
    sizes = [_tensor(each).meta["val"].shape[-1] for each in signals]
    if not _same(*sizes):
        signals = [_filled_up(w, each, one.of.n) for each in signals]
    combine = w.sub if target is _aten.sub.Tensor else w.add
    return replace(one.of, of=Pair(*(combine(*parts) for parts in zip(*map(parts_of, signals), strict=True))))


def _mirrored(w: Writer, target: Any, spectrum: Any) -> Of | None:
    """The conjugate of a spectrum: that of conj(x[-t]), round about."""
    if not isinstance(spectrum, Spectrum):
        return None
    filled = alike(_aten.flip.default, (0,), w, _filled_up(w, spectrum.of.signal(w), spectrum.of.n), [-1])
    turned = conjugate(w, alike(_aten.roll.default, (0,), w, filled, [1], [-1]))
    return replace(spectrum.of, of=turned)


def _elsewhere(w: Writer, target: Any, spectrum: Any, *rest: Any) -> Of | None:
    """What is done to other axes than the last, where the frequencies are."""
    if not isinstance(spectrum, Spectrum) or spectrum.of.axis != -1 or not rest:
        return None
    signal = spectrum.of.signal(w)
    rank = _tensor(signal).meta["val"].dim()
    axis = rest[0] % (rank + 1 if target is _aten.unsqueeze.default else rank)
    if axis > (rank - 1 if target is _aten.unsqueeze.default else rank - 2):
        return None
    return replace(spectrum.of, of=alike(target, (0,), w, signal, axis, *rest[1:]))


def _filled_up(w: Writer, value: Pair, n: Any) -> Pair:
    """A signal with zeros behind it, up to n."""
    if _same(_tensor(value).meta["val"].shape[-1], n):
        return value
    missing = w.number(operator.sub, n, w.size(_tensor(value), -1))
    return alike(_aten.constant_pad_nd.default, (0,), w, value, [0, missing])


# Transforms along several axes


def _axes(value: Any, sizes: Any, axes: Any) -> list[tuple[int, Any]]:
    """Axes, and how many entries to take along each."""
    rank = _rank(value)
    if axes is None:
        axes = range(rank) if sizes is None else range(rank - len(sizes), rank)
    wanted = [None] * len(axes) if sizes is None else sizes
    return [(axis, None if size == -1 else size) for axis, size in zip(axes, wanted, strict=True)]


def forward_n(
    onesided: bool, w: Writer, value: Any, s: Any = None, dim: Any = None, norm: str | None = None
) -> Pair:
    """`fftn`, `rfftn` and those for two axes."""
    *others, (axis, size) = _axes(value, s, dim)
    found: Pair = transform(w, value, size, axis, onesided=onesided, power=_BACKWARD[norm])
    for axis, size in others:
        found = transform(w, found, size, axis, power=_BACKWARD[norm])
    return found


def inverse_n(
    real: bool, w: Writer, value: Any, s: Any = None, dim: Any = None, norm: str | None = None
) -> Any:
    """`ifftn`, `irfftn` and those for two axes."""
    *others, (last, size) = _axes(value, s, dim)
    power = 2 - _BACKWARD[norm]
    for axis, n in others:
        value = inverse(w, value, n, axis, power)
    return (inverse_real if real else inverse)(w, value, size, last, power)


def _pair(rule: Rule, kind: bool) -> Rule:
    def both(w: Writer, value: Any, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> Any:
        return rule(kind, w, value, s, dim, norm)

    return both


def forward(
    onesided: bool, w: Writer, value: Any, n: Any = None, dim: int = -1, norm: str | None = None
) -> Pair:
    """`fft` and `rfft`."""
    return transform(w, value, n, dim, onesided=onesided, power=_BACKWARD[norm])


def backward(real: bool, w: Writer, value: Any, n: Any = None, dim: int = -1, norm: str | None = None) -> Any:
    """`ifft` and `irfft`."""
    return (inverse_real if real else inverse)(w, value, n, dim, 2 - _BACKWARD[norm])


# What these are made of


def to_complex(w: Writer, value: Any, dim: Sequence[int], normalization: int, onesided: bool) -> Pair:
    """`_fft_r2c`."""
    *others, last = dim
    found: Pair = transform(w, value, None, last, onesided=onesided, power=normalization)
    for axis in others:
        found = transform(w, found, None, axis, power=normalization)
    return found


def among_complex(w: Writer, value: Any, dim: Sequence[int], normalization: int, forward: bool) -> Pair:
    """`_fft_c2c`."""
    for axis in dim:
        if forward:
            value = transform(w, value, None, axis, power=normalization)
        else:
            value = inverse(w, value, None, axis, normalization)
    return Pair(*parts_of(value)) if not isinstance(value, Pair) else value


def to_real(w: Writer, value: Any, dim: Sequence[int], normalization: int, last_dim_size: Any) -> fx.Node:
    """`_fft_c2r`."""
    *others, last = dim
    for axis in others:
        value = inverse(w, value, None, axis, normalization)
    return inverse_real(w, value, last_dim_size, last, normalization)


RULES: dict[Any, Rule] = {
    _aten.fft_fft.default: partial(forward, False),
    _aten.fft_rfft.default: partial(forward, True),
    _aten.fft_ifft.default: partial(backward, False),
    _aten.fft_irfft.default: partial(backward, True),
    _aten.fft_fft2.default: _pair(forward_n, False),
    _aten.fft_rfft2.default: _pair(forward_n, True),
    _aten.fft_ifft2.default: _pair(inverse_n, False),
    _aten.fft_irfft2.default: _pair(inverse_n, True),
    _aten.fft_fftn.default: partial(forward_n, False),
    _aten.fft_rfftn.default: partial(forward_n, True),
    _aten.fft_ifftn.default: partial(inverse_n, False),
    _aten.fft_irfftn.default: partial(inverse_n, True),
    _aten._fft_r2c.default: to_complex,
    _aten._fft_c2c.default: among_complex,
    _aten._fft_c2r.default: to_real,
}
_ALONG = (_aten.unsqueeze.default, _aten.select.int, _aten.slice.Tensor)
_SIGNALS: dict[Any, Callable[..., Of | None]] = {
    **dict.fromkeys((_aten.mul.Tensor, _aten.mul.Scalar), _product),
    **dict.fromkeys((_aten.div.Tensor, _aten.div.Scalar), _scaled),
    **dict.fromkeys((_aten.add.Tensor, _aten.sub.Tensor), _sum),
    **dict.fromkeys((_aten._conj.default, _aten.conj.default, _aten._conj_physical.default), _mirrored),
    **dict.fromkeys(_ALONG, _elsewhere),
}
SIGNAL_RULES = frozenset(_SIGNALS)
"""Operators that mean something for the signals of spectra."""
