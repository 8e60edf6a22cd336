"""The compiled modules below Mamba's and VMamba's Python code: `selective_scan_cuda.fwd` and its successors.

    import selective_scan_cuda_oflex
    out, x, *rest = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, 1, oflex)

Of `x`, what the kernel keeps for its gradient, the last state alone is there: `x[:, :, -1, 1::2]`.

Source: the calls in https://github.com/state-spaces/mamba and https://github.com/MzeroMiko/VMamba.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_export.export.frontend.kernels.scans import selective_scan_fn


def fwd_mamba(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The output without the gate, the states, and, where there is a gate, the output with it."""
    y, states = _scanned(u, delta, A, B, C, D, delta_bias, delta_softplus)
    if z is None:
        return [y, states]
    return [y, states, (y.float() * torch.nn.functional.silu(z.float())).to(y.dtype)]


def fwd_core(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor]:
    """The output, in the dtype of u, and the states."""
    return list(_scanned(u, delta, A, B, C, D, delta_bias, delta_softplus))


def fwd_oflex(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = True,
) -> list[Tensor]:
    """The output, in float32 if `out_float`, and the states."""
    wide = u.float() if out_float else u
    return list(_scanned(wide, delta, A, B, C, D, delta_bias, delta_softplus))


def _scanned(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    found = selective_scan_fn(u, delta, A, B, C, D, None, bias, softplus, return_last_state=True)
    assert isinstance(found, tuple)
    y, last = found
    return y, torch.stack([torch.ones_like(last), last], dim=-1).flatten(-2)[:, :, None]  # (b, d, 1, 2n)
