"""Fourier transforms and circular convolutions of real tensors as operators of our own, along the last axis.

    fourier        X[k] = sum_j x[j] e^(-+ 2 pi i jk / n)   for k < n, or up to n // 2; real parts, imaginary ones
    fourier_real   the real y[t] whose spectrum's first entries are given, t < n; the others are their conjugates
    convolve       y[t] = sum_j a[j] b[(t - j) mod n]   for t < length; `wraps`: |a| + |b| - 1 may be more than n

Operands may be shorter than n, and then go on with zeros; their sizes are given as numbers, so that what is computed
from one size is computed once. In PyTorch they run as `torch.fft` does. In ONNX they are carried as opaque nodes, and
become matrix products (`onnx.fourier`): ONNX's own `DFT` is wrong in ONNX Runtime at lengths that are no power of two,
and TensorRT has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _scale(n: int, power: int) -> float:
    """The factor by which a transform is scaled: a power of 1 / sqrt(n)."""
    return math.pow(n, -power / 2)


@torch.library.custom_op(
    "moe_export::fourier",
    mutates_args=(),
    schema="(Tensor real, Tensor? imag, SymInt size, SymInt n, bool onesided, bool inverse, int power) -> Tensor",
)
def _fourier(
    real: Tensor, imag: Tensor | None, size: int, n: int, onesided: bool, inverse: bool, power: int
) -> Tensor:
    value = real if imag is None else torch.complex(real, imag)
    found = torch.fft.ifft(value, n, norm="forward") if inverse else torch.fft.fft(value, n)
    found = found[..., : n // 2 + 1 if onesided else n] * _scale(n, power)
    return torch.cat([found.real, found.imag], -1)


_fourier.register_fake(
    lambda real, imag, size, n, onesided, inverse, power: real.new_empty(
        [*real.shape[:-1], 2 * (n // 2 + 1 if onesided else n)]
    )
)


@torch.library.custom_op(
    "moe_export::fourier_real",
    mutates_args=(),
    schema="(Tensor real, Tensor? imag, SymInt size, SymInt n, int power) -> Tensor",
)
def _fourier_real(real: Tensor, imag: Tensor | None, size: int, n: int, power: int) -> Tensor:
    value = torch.complex(real, torch.zeros_like(real) if imag is None else imag)
    found: Tensor = torch.fft.irfft(value, n, norm="forward")
    return found * _scale(n, power)


_fourier_real.register_fake(lambda real, imag, size, n, power: real.new_empty([*real.shape[:-1], n]))


@torch.library.custom_op(
    "moe_export::convolve",
    mutates_args=(),
    schema="(Tensor a, Tensor b, SymInt a_size, SymInt b_size, SymInt n, SymInt length, bool wraps) -> Tensor",
)
def _convolve(a: Tensor, b: Tensor, a_size: int, b_size: int, n: int, length: int, wraps: bool) -> Tensor:
    product = torch.fft.rfft(a, n) * torch.fft.rfft(b, n)
    found: Tensor = torch.fft.irfft(product, n)
    return found[..., :length].contiguous()


@_convolve.register_fake
def _(a: Tensor, b: Tensor, a_size: int, b_size: int, n: int, length: int, wraps: bool) -> Tensor:
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])  # type: ignore[no-untyped-call]
    return a.new_empty([*shape, length])


FOURIER = torch.ops.moe_export.fourier.default
FOURIER_REAL = torch.ops.moe_export.fourier_real.default
CONVOLVE = torch.ops.moe_export.convolve.default
