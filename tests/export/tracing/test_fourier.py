"""Fourier transforms and convolutions as matrix products: against float64 at lengths 1, 2, odd, 1000 and 1024."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import fft, nn

from moe_export.export.tracing.fourier import CONVOLVE, FOURIER, FOURIER_REAL
from moe_export.float64 import double_module, in_float64

LENGTHS = (1, 2, 7, 64, 1000, 1024)


class Does(nn.Module):
    """A function, or several, as a module."""

    def __init__(self, *functions, **weights):
        super().__init__()
        self.functions = functions
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x):
        found = [function(self, x) for function in self.functions]
        return tuple(torch.view_as_real(each.resolve_conj()) if each.is_complex() else each for each in found)


def off(tools, graph, model, x):
    """The largest error of the graph, and of PyTorch, relative to the largest value, for each output."""
    found = tools.run(graph.model, x=x).values()
    with torch.no_grad():
        with in_float64():
            wanted = double_module(model)(x.double())
        own = model(x)
    rows = []
    for array, exact, eager in zip(found, wanted, own, strict=True):
        assert array.shape == tuple(exact.shape)
        scale = max(float(exact.abs().max()), 1e-30)
        rows.append(
            (float(np.abs(array - exact.numpy()).max()) / scale, float((eager - exact).abs().max()) / scale)
        )
    return rows


def calls(graph, target):
    return [node for node in graph.traced.program.graph.nodes if node.target is target]


def test_transforms_of_any_length(tools):
    model = Does(
        lambda _, x: fft.rfft(x),
        lambda _, x: fft.fft(x, norm="ortho"),
        lambda _, x: fft.ifft(fft.fft(x) * (1 + 2j)).abs(),
        lambda _, x: fft.irfft(fft.rfft(x).abs(), n=x.shape[-1]),
        lambda _, x: fft.irfft(fft.rfft(x, norm="forward") ** 2, n=x.shape[-1], norm="forward"),
        lambda _, x: fft.rfft(x, n=24),
        lambda _, x: fft.irfft(x, n=9, norm="ortho"),
        lambda _, x: fft.fftshift(fft.fft(x), -1),
        lambda _, x: fft.ifftshift(fft.rfft(x).real, -1),
        lambda _, x: fft.rfft((x * 4).int()),
        lambda _, x: fft.irfft(fft.rfft(x) * fft.rfft(x.double()), n=x.shape[-1]).float(),
    )
    graph = tools.graph(model, torch.randn(2, 30))
    for length in LENGTHS:
        for error, own in off(tools, graph, model, torch.randn(2, length)):
            assert error < 1e-6 + 4 * own, length


@pytest.mark.slow
def test_transforms_along_other_axes(tools):
    model = Does(
        lambda _, x: fft.rfft(x, dim=1).imag,
        lambda _, x: fft.rfft2(x, dim=(1, 2), norm="ortho"),
        lambda _, x: fft.irfft2(fft.rfft2(x) * 1j, s=x.shape[-2:]),
        lambda _, x: fft.fft(fft.fft(x, dim=-1), dim=1).real,
        lambda _, x: fft.fftn(x, dim=(0, 1)),
        lambda _, x: fft.ifftn(fft.fftn(x)).real,
        lambda _, x: fft.irfftn(fft.rfftn(x, dim=(1, 2)).sgn(), s=x.shape[1:], dim=(1, 2)).flatten(1),
    )
    graph = tools.graph(model, torch.randn(2, 6, 10))
    for shape in ((1, 1, 1), (3, 5, 9), (2, 14, 8)):
        for error, own in off(tools, graph, model, torch.randn(shape)):
            assert error < 1e-6 + 4 * own, shape


def causal(model, x):
    n = 2 * x.shape[-1]
    kernel = model.kernel[:, : x.shape[-1]]
    return fft.irfft(fft.rfft(x, n=n) * fft.rfft(kernel, n=n), n=n)[..., : x.shape[-1]]


def hyena_like(model, x):
    n = 2 * x.shape[-1]
    kernel = fft.rfft(model.kernel[:, : x.shape[-1]], n=n) / n
    return fft.irfft(fft.rfft(x, n=n) * kernel, n=n, norm="forward")[..., : x.shape[-1]]


def round_about(model, x):
    n = x.shape[-1]
    return fft.irfft(fft.rfft(x) * fft.rfft(model.kernel[:, :n]), n=n)


def correlated(model, x):
    n = x.shape[-1]
    return fft.irfft(fft.rfft(x) * torch.conj(fft.rfft(model.kernel[:, :n])), n=n)


def both_ways(model, x):
    n = 2 * x.shape[-1]
    kernel = model.kernel[:, : x.shape[-1]]
    kernel = nn.functional.pad(kernel, (0, x.shape[-1])) + nn.functional.pad(
        kernel.flip(-1), (x.shape[-1], 0)
    )
    return fft.irfft(fft.rfft(x, n=n) * fft.rfft(kernel, n=n), n=n)[..., : x.shape[-1]]


def by_complex(model, x):
    n = 2 * x.shape[-1]
    kernel = model.kernel[:, : x.shape[-1]] * torch.exp(1j * x[0, 0])
    return fft.ifft(fft.fft(x, n=n) * fft.fft(kernel, n=n))[..., : x.shape[-1]].imag


def over_time(model, x):
    x = x.mT  # (batch, time, channels)
    n = 2 * x.shape[1]
    spectrum = fft.rfft(x, n=n, dim=1) * fft.rfft(model.kernel[:, : x.shape[1]].T, n=n, dim=0)
    return fft.irfft(spectrum, n=n, dim=1)[:, : x.shape[1]]


def in_sum(model, x):
    n = 2 * x.shape[-1] + 3
    kernel = model.kernel[:, : x.shape[-1]]
    spectrum = fft.rfft(kernel, n=n) - 0.5 * fft.rfft(kernel.cumsum(-1) * 0.1, n=n)
    return fft.irfft(spectrum.unsqueeze(0) * fft.rfft(x, n=n), n=n)


CONVOLUTIONS = (causal, hyena_like, round_about, correlated, both_ways, by_complex, over_time, in_sum)


def test_products_of_spectra_are_convolutions(tools):
    torch.manual_seed(0)
    model = Does(*CONVOLUTIONS, kernel=torch.randn(3, 1024) * torch.exp(-torch.arange(1024) / 50))
    graph = tools.graph(model, torch.randn(2, 3, 20))
    assert len(calls(graph, CONVOLVE)) == len(CONVOLUTIONS) + 1  # the kernel of one has two parts
    assert not calls(graph, FOURIER)
    assert not calls(graph, FOURIER_REAL)
    for length in LENGTHS:
        x = torch.randn(2, 3, length)
        for (error, own), function in zip(off(tools, graph, model, x), CONVOLUTIONS, strict=True):
            assert error < 1e-6 + 4 * own, (function, length)


def test_a_spectrum_that_is_looked_at_is_computed(tools):
    def shown(model, x):
        spectrum = fft.rfft(x) * fft.rfft(model.kernel[:, : x.shape[-1]])
        return fft.irfft(spectrum * (spectrum.abs() > 1), n=x.shape[-1])

    torch.manual_seed(0)
    model = Does(shown, kernel=torch.randn(3, 64))
    graph = tools.graph(model, torch.randn(2, 3, 20))
    assert len(calls(graph, FOURIER)) == 2
    for error, own in off(tools, graph, model, torch.randn(2, 3, 33)):
        assert error < 1e-6 + 4 * own


class Kernel(nn.Module):
    """S4D: a diagonal state space model as a convolution, its kernel a sum of exponentials."""

    def __init__(self, width=4, states=8):
        super().__init__()
        self.log_step = nn.Parameter(torch.rand(width) * 4 - 6)
        self.real = nn.Parameter(torch.full((width, states), 0.5).log())
        self.imag = nn.Parameter(math.pi * torch.arange(states).repeat(width, 1))
        self.outward = nn.Parameter(torch.randn(width, states, 2))

    def forward(self, u):
        length = u.shape[-1]
        rate = -self.real.exp() + 1j * self.imag
        turned = rate * self.log_step.exp()[:, None]
        weight = torch.view_as_complex(self.outward) * (turned.exp() - 1) / rate
        powers = torch.exp(turned[..., None] * torch.arange(length))
        kernel = 2 * torch.einsum("hn,hnl->hl", weight, powers).real
        spectrum = fft.rfft(u, n=2 * length) * fft.rfft(kernel, n=2 * length)
        return (fft.irfft(spectrum, n=2 * length)[..., :length],)


def test_a_diagonal_state_space_model_by_its_kernel(tools):
    torch.manual_seed(0)
    model = Kernel()
    graph = tools.graph(model, torch.randn(2, 4, 12))
    assert all(isinstance(graph.traced.inputs["u"][axis], str) for axis in (0, 2))
    for length in LENGTHS:
        u = torch.randn(3, 4, length)
        (found,) = tools.run(graph.model, u=u).values()
        with torch.no_grad():
            with in_float64():
                (wanted,) = double_module(model)(u.double())
            (own,) = model(u)
        scale, lost = wanted.abs().max(), (own - wanted).abs().max()
        assert np.abs(found - wanted.numpy()).max() < 1e-6 * scale + 4 * lost, length


@pytest.mark.slow
def test_large_fixed_sizes_are_convolutions(tools):
    model = Does(
        lambda _, x: fft.rfft(x, n=2400), lambda _, x: fft.irfft(x, n=2399), lambda _, x: fft.ifft(x * 1j)
    )
    graph = tools.graph(model, torch.randn(2, 2400))
    assert sum(value.const_value.nbytes for value in graph.model.graph.initializers.values()) < 2**20
    for error, own in off(tools, graph, model, torch.randn(3, 2400)):
        assert error < 1e-6 + 4 * own
