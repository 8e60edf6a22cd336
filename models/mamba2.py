"""Mamba-2: state space duality, SSD (arXiv:2405.21060), in the chunked form of the paper's listing 1.

Within a chunk the recurrence is a masked matrix product; only the states at the chunks' ends are passed on.

Glossary:
    b: batch            l: sequence length, later position in a chunk       s: a second position in it
    c: chunks           z: a second chunk       h: heads        p: size of a head       n: state size
    d, d_model: size of a token's vector        d_in: expand * d = h * p
B and C are shared by all heads: their head axis has size 1 and is broadcast against h.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from moe_export.models.mamba import RMSNorm


def segsum(x: Tensor) -> Tensor:
    """Sum every segment: out[..., i, j] = x[j+1] + ... + x[i], 0 on the diagonal and -inf above it.

    Each segment is summed by itself. The difference of two cumulative sums would lose digits when both are
    large, and -inf is filled in last, so nothing is ever subtracted from it.

    Args:
        x: (..., l).

    Returns:
        (..., l, l).
    """
    length = x.shape[-1]
    x = repeat(x, "... l -> ... l s", s=length)
    mask = torch.ones(length, length, dtype=torch.bool, device=x.device)
    x = x.masked_fill(~torch.tril(mask, diagonal=-1), 0.0)
    x_segsum = torch.cumsum(x, dim=-2)
    return x_segsum.masked_fill(~torch.tril(mask), -torch.inf)


def ssd(x: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int) -> Tensor:
    """Compute h(t) = exp(A(t)) h(t-1) + B(t) x(t), y(t) = C(t) h(t) without a loop over time.

    Args:
        x: (b, l, h, p), already multiplied by the step size.
        A: (b, l, h), the logarithm of the decay, at most 0; already multiplied by the step size.
        B: (b, l, 1 or h, n).
        C: (b, l, 1 or h, n).
        block_len: length of a chunk; must divide l.

    Returns:
        y: (b, l, h, p).
    """
    if x.shape[1] % block_len:
        raise ValueError(f"length {x.shape[1]} is not a multiple of block_len={block_len}")
    x, A, B, C = (rearrange(t, "b (c l) ... -> b c l ...", l=block_len) for t in (x, A, B, C))
    A = rearrange(A, "b c l h -> b h c l")
    A_cumsum = torch.cumsum(A, dim=-1)  # (b, h, c, l)

    # 1. Within each chunk: the diagonal blocks.
    L = torch.exp(segsum(A))  # (b, h, c, l, s)
    Y_diag = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, L, x)

    # 2. What each chunk adds to the state at its end.
    decay_states = torch.exp(A_cumsum[..., -1:] - A_cumsum)  # (b, h, c, l)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, decay_states, x)

    # 3. Between chunks: the state in which each one starts; the first starts from zero.
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)  # (b, c+1, h, p, n)
    decay_chunk = torch.exp(segsum(F.pad(A_cumsum[..., -1], (1, 0))))  # (b, h, z=c+1, c+1)
    states = torch.einsum("bhzc,bchpn->bzhpn", decay_chunk, states)[:, :-1]  # (b, c, h, p, n)

    # 4. What the state at its start gives to each position of a chunk.
    state_decay_out = torch.exp(A_cumsum)  # (b, h, c, l)
    Y_off = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, state_decay_out)

    return rearrange(Y_diag + Y_off, "b c l h p -> b (c l) h p")


class Mamba2Block(nn.Module):
    """The Mamba-2 block of the paper's figure 6, with one group of B and C.

    Args:
        d_model: d.
        d_state: n.
        d_conv: taps of the causal convolution.
        expand: d_in over d.
        headdim: p; must divide d_in.
        chunk_size: length of a chunk; must divide the length of every input.
    """

    def __init__(
        self,
        d_model: int = 32,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 16,
        chunk_size: int = 8,
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        if self.d_inner % headdim:
            raise ValueError(f"expand * d_model = {self.d_inner} is not a multiple of headdim={headdim}")
        self.nheads = self.d_inner // headdim
        self.headdim = headdim
        self.d_state = d_state
        self.chunk_size = chunk_size

        conv_dim = self.d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + conv_dim + self.nheads, bias=False)  # z, xBC, dt
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, kernel_size=d_conv, groups=conv_dim, padding=d_conv - 1)
        self.norm = RMSNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

        self.A_log = nn.Parameter(torch.log(torch.empty(self.nheads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(self.nheads))
        dt = torch.exp(torch.empty(self.nheads).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, u: Tensor) -> Tensor:
        """Mix along time, causally: (b, l, d) → (b, l, d)."""
        length = u.shape[1]
        zxbcdt = self.in_proj(u)  # (b, l, 2*d_in + 2*n + h)
        z, xBC, dt = torch.split(zxbcdt, [self.d_inner, self.d_inner + 2 * self.d_state, self.nheads], dim=-1)
        dt = F.softplus(dt + self.dt_bias)  # (b, l, h)

        xBC = self.conv1d(xBC.transpose(1, 2))[:, :, :length].transpose(1, 2)  # (b, l, d_in + 2*n)
        x, B, C = torch.split(F.silu(xBC), [self.d_inner, self.d_state, self.d_state], dim=-1)
        x = rearrange(x, "b l (h p) -> b l h p", p=self.headdim)
        A = -torch.exp(self.A_log)  # (h,)

        y = ssd(
            x * dt.unsqueeze(-1),
            A * dt,
            rearrange(B, "b l n -> b l 1 n"),
            rearrange(C, "b l n -> b l 1 n"),
            self.chunk_size,
        )  # (b, l, h, p)
        y = y + x * self.D.unsqueeze(-1)
        y = rearrange(y, "b l h p -> b l (h p)")
        out: Tensor = self.out_proj(self.norm(y * F.silu(z)))  # (b, l, d)
        return out


torch.manual_seed(0)
model = Mamba2Block(d_model=32, d_state=16, headdim=16, chunk_size=8)
example_inputs = (torch.randn(2, 24, 32),)

if __name__ == "__main__":
    y = model(*example_inputs)
    print("y", tuple(y.shape))
