"""Fourier transforms of `torch.fft` in parts: `fourier` along one axis, and along several one after another."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from moe_export.export.tracing.complex_arithmetic import Rule
from moe_export.export.tracing.complex_writer import Pair, Part, Writer, parts_of
from moe_export.export.tracing.fourier import FOURIER, FOURIER_REAL
from moe_export.export.tracing.spectrum import (
    Of,
    Spectrum,
    axis_of,
    cut,
    moved,
    rank_of,
    same,
    signal_of,
    tensor_of,
)

_aten = torch.ops.aten
_BACKWARD = {None: 0, "backward": 0, "ortho": 1, "forward": 2}
"""By the name of a norm: the power of 1 / sqrt(n) that a transform is scaled by; an inverse one by the rest to 2."""


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
    axis = axis_of(value, axis)
    signal = moved(w, w.typed(value), axis, -1)
    n = w.size(tensor_of(signal), -1) if n is None else n
    signal = cut(w, signal, n)

    def compute() -> tuple[Part, Part]:
        kept = w.number(operator.add, w.number(operator.floordiv, n, 2), 1) if onesided else n
        real, imag = w.whole(signal) if signal.real is None else signal.parts
        both = w.call(FOURIER, real, imag, w.size(tensor_of(signal), -1), n, onesided, inverse, power)
        twice = w.number(operator.mul, kept, 2)
        parts = Pair(
            w.call(_aten.slice.Tensor, both, -1, 0, kept), w.call(_aten.slice.Tensor, both, -1, kept, twice)
        )
        return moved(w, parts, -1, axis).parts

    return Spectrum(Of(signal, n, axis, onesided, power), compute)


def inverse(w: Writer, value: Any, n: Any, axis: int, power: int) -> Pair:
    """`ifft` along an axis, scaled by a power of 1 / sqrt(n)."""
    known = isinstance(value, Spectrum) and not value.of.onesided and value.of.axis == axis_of(value, axis)
    signal = signal_of(w, value.of, power) if known and (n is None or same(n, value.of.n)) else None
    if signal is not None:
        return signal
    found = transform(w, value, n, axis, inverse=True, power=power)
    return Pair(*found.parts)


def inverse_real(w: Writer, value: Any, n: Any, axis: int, power: int) -> fx.Node:
    """`irfft` along an axis, scaled by a power of 1 / sqrt(n)."""
    axis = axis_of(value, axis)
    known = isinstance(value, Spectrum) and value.of.onesided and value.of.axis == axis
    signal = signal_of(w, value.of, power) if known and n is not None and same(n, value.of.n) else None
    if signal is not None:
        return tensor_of(signal)
    pair = moved(w, w.typed(value), axis, -1)
    if n is None:
        n = w.number(operator.mul, w.number(operator.sub, w.size(tensor_of(pair), -1), 1), 2)
    pair = cut(w, pair, w.number(operator.add, w.number(operator.floordiv, n, 2), 1))
    real, imag = w.whole(pair) if pair.real is None else pair.parts
    found = w.call(FOURIER_REAL, real, imag, w.size(tensor_of(pair), -1), n, power)
    return tensor_of(moved(w, found, -1, axis))


# Transforms along several axes


def _axes(value: Any, sizes: Any, axes: Any) -> list[tuple[int, Any]]:
    """Axes, and how many entries to take along each."""
    rank = rank_of(value)
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
