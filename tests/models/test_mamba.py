"""Mamba against the recurrence written with scalars and against its properties, in float64."""

import math

import numpy as np
import pytest
import torch

from moe_export.models.mamba import MambaBlock, ResidualBlock, RMSNorm, selective_scan


def scan_arguments(b, length, d, n, delta=1.0, decay=1.0):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    u, B, C, D = draw(b, length, d), draw(b, length, n), draw(b, length, n), draw(d)
    return u, delta * draw(b, length, d).abs(), -decay * draw(d, n).abs(), B, C, D


def recurrence(u, delta, A, B, C, D):
    """Every number of the state by itself."""
    u, delta, A, B, C, D = (t.numpy() for t in (u, delta, A, B, C, D))
    b, length, d = u.shape
    y = np.zeros((b, length, d))
    for i, j in np.ndindex(b, d):
        h = [0.0] * A.shape[1]
        for t in range(length):
            for n in range(len(h)):
                decay = math.exp(delta[i, t, j] * A[j, n])
                h[n] = decay * h[n] + delta[i, t, j] * B[i, t, n] * u[i, t, j]
                y[i, t, j] += C[i, t, n] * h[n]
            y[i, t, j] += D[j] * u[i, t, j]
    return torch.from_numpy(y)


@pytest.mark.parametrize(
    ("b", "length", "d", "n"), [(1, 1, 1, 1), (1, 5, 3, 1), (2, 10, 6, 4), (3, 33, 2, 8)]
)
def test_scan_equals_the_recurrence(b, length, d, n):
    arguments = scan_arguments(b, length, d, n)
    torch.testing.assert_close(selective_scan(*arguments), recurrence(*arguments))


@pytest.mark.parametrize(("delta", "decay"), [(0.0, 1.0), (1.0, 0.0), (10.0, 100.0)])
def test_scan_without_steps_without_decay_and_with_strong_decay(delta, decay):
    arguments = scan_arguments(2, 12, 3, 4, delta, decay)
    y = selective_scan(*arguments)
    assert y.isfinite().all()
    torch.testing.assert_close(y, recurrence(*arguments))


def block_by_hand(block, x):
    """The block with NumPy's matmul, a convolution written out and the recurrence above."""
    x_res = x @ block.in_proj.weight.T
    x, res = x_res[..., : block.d_inner], x_res[..., block.d_inner :]
    taps = block.conv1d.weight[:, 0]  # (d_in, d_conv), the last tap belongs to the present
    conv = torch.zeros_like(x) + block.conv1d.bias
    for t in range(x.shape[1]):
        for back in range(min(t + 1, taps.shape[1])):
            conv[:, t] += taps[:, -1 - back] * x[:, t - back]
    x = conv * torch.sigmoid(conv)
    dbl = x @ block.x_proj.weight.T
    r, n = block.dt_rank, block.d_state
    delta = torch.log1p(torch.exp(dbl[..., :r] @ block.dt_proj.weight.T + block.dt_proj.bias))
    y = recurrence(x, delta, -block.A_log.exp(), dbl[..., r : r + n], dbl[..., r + n :], block.D)
    return (y * res * torch.sigmoid(res)) @ block.out_proj.weight.T


@pytest.mark.parametrize(("b", "length"), [(1, 1), (2, 3), (2, 10)])
@torch.no_grad()
def test_block_equals_the_block_by_hand(b, length):
    block = MambaBlock(d_model=6, d_state=4, d_conv=4, dt_rank=3).double()
    x = torch.randn(b, length, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), block_by_hand(block, x))


def test_block_is_causal():
    model = ResidualBlock(8, 4).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    before = model(x)
    changed = x.clone()
    changed[:, 7:] += 1.0
    after = model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-6


def test_residual():
    model = ResidualBlock(8, 4)
    with torch.no_grad():
        model.mixer.out_proj.weight.zero_()
    x = torch.randn(2, 5, 8)
    assert torch.equal(model(x), x)


def test_step_sizes_start_between_a_thousandth_and_a_tenth():
    steps = torch.nn.functional.softplus(MambaBlock(d_model=64).dt_proj.bias)
    assert 0.9e-3 < steps.min() < 0.01 < steps.max() < 0.11


def test_rms_norm_has_unit_mean_square():
    y = RMSNorm(16).double()(100 * torch.randn(3, 16, dtype=torch.float64))
    torch.testing.assert_close(y.square().mean(-1), torch.ones(3, dtype=torch.float64))
