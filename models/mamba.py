"""Mamba: a selective state space model (arXiv:2312.00752), the recurrence as a plain loop over time.

Glossary:
    b: batch            l: sequence length      d, d_model: size of a token's vector
    n: state size       d_in: expand * d        dt_rank: rank of the step size's projection
    A, B, C, D: the state space's parameters; B, C and the step size delta depend on the input ("selective")
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467)."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Scale each vector of (..., d) to unit mean square."""
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps) * self.weight


class MambaBlock(nn.Module):
    """The Mamba block of the paper's figure 3.

    Args:
        d_model: d.
        d_state: n.
        d_conv: taps of the causal convolution.
        expand: d_in over d.
        dt_rank: rank of the step size's projection; d / 16, rounded up, when not given.
    """

    def __init__(
        self,
        d_model: int = 32,
        d_state: int = 8,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, kernel_size=d_conv, groups=self.d_inner, padding=d_conv - 1
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)  # delta, B, C
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

        # Section 3.6: A starts as -1, -2, ..., -n in every channel (S4D-Real).
        self.A_log = nn.Parameter(
            torch.log(repeat(torch.arange(1.0, d_state + 1), "n -> d_in n", d_in=self.d_inner))
        )
        self.D = nn.Parameter(torch.ones(self.d_inner))
        # Section 3.6: softplus(bias) is spread between 0.001 and 0.1 on a logarithmic scale.
        dt = torch.exp(torch.empty(self.d_inner).uniform_(math.log(0.001), math.log(0.1)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """Mix along time, causally: (b, l, d) → (b, l, d)."""
        length = x.shape[1]
        x_and_res = self.in_proj(x)  # (b, l, 2*d_in)
        x, res = x_and_res.chunk(2, dim=-1)  # (b, l, d_in), (b, l, d_in)

        x = rearrange(x, "b l d_in -> b d_in l")
        x = self.conv1d(x)[:, :, :length]  # the padding lets the last taps run over the end
        x = rearrange(x, "b d_in l -> b l d_in")
        x = F.silu(x)

        y = self.ssm(x)  # (b, l, d_in)
        y = y * F.silu(res)
        out: Tensor = self.out_proj(y)  # (b, l, d)
        return out

    def ssm(self, x: Tensor) -> Tensor:
        """Algorithm 2: compute delta, A, B, C and D, then scan: (b, l, d_in) → (b, l, d_in)."""
        A = -torch.exp(self.A_log)  # (d_in, n)
        x_dbl = self.x_proj(x)  # (b, l, dt_rank + 2*n)
        delta, B, C = x_dbl.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.softplus(self.dt_proj(delta))  # (b, l, d_in)
        return selective_scan(x, delta, A, B, C, self.D)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Section 2: x(t) = exp(delta A) x(t-1) + delta B u(t); y(t) = C x(t) + D u(t).

    A is discretised by zero-order hold and B by Euler's rule, as in the authors' kernel.

    Args:
        u: (b, l, d_in), the input.
        delta: (b, l, d_in), the step sizes.
        A: (d_in, n).
        B: (b, l, n).
        C: (b, l, n).
        D: (d_in,).

    Returns:
        y: (b, l, d_in).
    """
    b, length, d_in = u.shape
    n = A.shape[1]
    deltaA = torch.exp(einsum(delta, A, "b l d_in, d_in n -> b l d_in n"))
    deltaB_u = einsum(delta, B, u, "b l d_in, b l n, b l d_in -> b l d_in n")

    x = torch.zeros((b, d_in, n), dtype=u.dtype, device=u.device)
    ys = []
    for i in range(length):
        x = deltaA[:, i] * x + deltaB_u[:, i]  # (b, d_in, n)
        y = einsum(x, C[:, i, :], "b d_in n, b n -> b d_in")
        ys.append(y)
    y = torch.stack(ys, dim=1)  # (b, l, d_in)
    return y + u * D


class ResidualBlock(nn.Module):
    """Normalise, mix, add: x + mamba(norm(x))."""

    def __init__(self, d_model: int = 32, d_state: int = 8) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = MambaBlock(d_model, d_state)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) → (b, l, d)."""
        out: Tensor = self.mixer(self.norm(x)) + x
        return out


torch.manual_seed(0)
model = ResidualBlock(d_model=32, d_state=8)
example_inputs = (torch.randn(2, 10, 32),)

if __name__ == "__main__":
    y = model(*example_inputs)
    print("y", tuple(y.shape))
