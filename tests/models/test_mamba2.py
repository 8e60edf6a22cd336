"""SSD in chunks against the recurrence step by step, in float64."""

import pytest
import torch

from moe_export.models.mamba2 import Mamba2Block, segsum, ssd


def ssd_arguments(b, length, h, p, n, groups=1, decay=1.0):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return (
        draw(b, length, h, p),
        -decay * draw(b, length, h).abs(),
        draw(b, length, groups, n),
        draw(b, length, groups, n),
    )


def recurrence(x, A, B, C):
    b, length, h, p = x.shape
    B, C = B.expand(b, length, h, -1), C.expand(b, length, h, -1)
    state = torch.zeros(b, h, p, B.shape[-1], dtype=x.dtype)
    ys = []
    for t in range(length):
        state = A[:, t].exp()[..., None, None] * state + x[:, t][..., :, None] * B[:, t][..., None, :]
        ys.append((state * C[:, t][..., None, :]).sum(-1))
    return torch.stack(ys, dim=1)


@pytest.mark.parametrize(("length", "block_len"), [(1, 1), (8, 8), (8, 1), (24, 8), (64, 16), (15, 3)])
@pytest.mark.parametrize(("b", "h", "p", "n"), [(1, 1, 1, 1), (2, 4, 3, 5)])
def test_chunks_equal_the_recurrence(b, length, h, p, n, block_len):
    arguments = ssd_arguments(b, length, h, p, n)
    torch.testing.assert_close(ssd(*arguments, block_len), recurrence(*arguments))


def test_a_group_a_head():
    arguments = ssd_arguments(2, 24, 4, 3, 5, groups=4)
    torch.testing.assert_close(ssd(*arguments, 8), recurrence(*arguments))


@pytest.mark.parametrize("decay", [0.0, 1e-3, 50.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_decay_and_strong_decay(decay, dtype):
    arguments = ssd_arguments(2, 64, 4, 3, 5, decay=decay)
    y = ssd(*(t.to(dtype) for t in arguments), 16)
    assert y.isfinite().all()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(y.double(), recurrence(*arguments), **tolerance)


def test_segsum_sums_segments():
    x = torch.randn(2, 6, dtype=torch.float64)
    out = segsum(x)
    for i in range(6):
        for j in range(6):
            expected = x[:, j + 1 : i + 1].sum(-1) if i >= j else torch.full((2,), -torch.inf).double()
            torch.testing.assert_close(out[:, i, j], expected)


def test_segsum_keeps_small_segments_after_large_ones():
    x = torch.tensor([0.0, -1e6, -0.1, -0.1])
    assert segsum(x)[3, 1].item() == pytest.approx(-0.2, rel=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 4, 8, 24])
def test_block_does_not_depend_on_the_chunk(chunk_size):
    block = Mamba2Block(d_model=16, d_state=8, headdim=8, chunk_size=24).double()
    u = torch.randn(2, 24, 16, dtype=torch.float64)
    whole = block(u)
    block.chunk_size = chunk_size
    torch.testing.assert_close(block(u), whole)


def block_by_hand(block, u):
    """The projections, a convolution written out, the recurrence, the gate."""
    d, n = block.d_inner, block.d_state
    z, xBC, dt = (u @ block.in_proj.weight.T).split([d, d + 2 * n, block.nheads], dim=-1)
    dt = torch.log1p(torch.exp(dt + block.dt_bias))
    taps = block.conv1d.weight[:, 0]
    conv = torch.zeros_like(xBC) + block.conv1d.bias
    for t in range(u.shape[1]):
        for back in range(min(t + 1, taps.shape[1])):
            conv[:, t] += taps[:, -1 - back] * xBC[:, t - back]
    x, B, C = (conv * torch.sigmoid(conv)).split([d, n, n], dim=-1)
    x = x.reshape(*x.shape[:2], block.nheads, block.headdim)
    y = recurrence(x * dt[..., None], -block.A_log.exp() * dt, B[:, :, None], C[:, :, None])
    y = (y + block.D[:, None] * x).flatten(2) * z * torch.sigmoid(z)
    y = y / (y.square().mean(-1, keepdim=True) + block.norm.eps).sqrt() * block.norm.weight
    return y @ block.out_proj.weight.T


@pytest.mark.parametrize(("b", "length"), [(1, 4), (2, 12)])
@torch.no_grad()
def test_block_equals_the_block_by_hand(b, length):
    block = Mamba2Block(d_model=8, d_state=4, headdim=4, chunk_size=4).double()
    u = torch.randn(b, length, 8, dtype=torch.float64)
    torch.testing.assert_close(block(u), block_by_hand(block, u))


def test_block_is_causal():
    block = Mamba2Block(d_model=16, d_state=8, headdim=8, chunk_size=4).double()
    u = torch.randn(1, 16, 16, dtype=torch.float64)
    before = block(u)
    changed = u.clone()
    changed[:, 9:] += 1.0
    torch.testing.assert_close(before[:, :9], block(changed)[:, :9])
    assert (before[:, 9:] - block(changed)[:, 9:]).abs().max() > 1e-3


def test_refusals():
    with pytest.raises(ValueError, match="length 10 is not a multiple of block_len=8"):
        Mamba2Block(chunk_size=8)(torch.randn(1, 10, 32))
    with pytest.raises(ValueError, match="= 64 is not a multiple of headdim=48"):
        Mamba2Block(d_model=32, headdim=48)
