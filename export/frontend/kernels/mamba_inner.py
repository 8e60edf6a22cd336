"""Whole Mamba blocks in one call, as plain PyTorch: convolution, projections, scan, norm, output projection.

Source: the packages' documented signatures, https://github.com/state-spaces/mamba.

Letters: b batch, l length, d channels, n state size, r rank of the steps, h heads, p size of a head, g groups of heads,
w taps of the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_export.export.frontend.kernels.convolutions import causal_conv1d_fn
from moe_export.export.frontend.kernels.gated_norms import rmsnorm_fn
from moe_export.export.frontend.kernels.refusals import refuse_arguments
from moe_export.export.frontend.kernels.scans import (
    mamba_chunk_scan_combined,
    selective_scan_fn,
    ssd_selective_scan,
)

_ANY = (0.0, float("inf"))


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block behind its first projection.

    Args:
        xz: (b, 2 d, l): the input of the scan, and its gate.
        conv1d_weight: (d, 1, w).
        conv1d_bias: (d,).
        x_proj_weight: (r + 2 n, d).
        delta_proj_weight: (d, r).
        out_proj_weight: (out, d).
        out_proj_bias: (out,).
        A: (d, n).
        B: Computed from the input if it is None, as C is.
        C: See B.
        D: (d,).
        delta_bias: (d,).
        B_proj_bias: (n,); so is C_proj_bias.
        C_proj_bias: See B_proj_bias.
        delta_softplus: Whether the steps are softplus(delta + delta_bias).
        checkpoint_lvl: Of the gradient.
        b_rms_weight: Of a norm of B, (n,); of C and of delta, (r,), likewise.
        c_rms_weight: See b_rms_weight.
        dt_rms_weight: See b_rms_weight.
        b_c_dt_rms_eps: Of these norms.

    Returns:
        (b, l, out).
    """
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


mamba_inner_ref = mamba_inner_fn


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """`mamba_inner_fn` without its last projection: (b, d, l)."""
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.chunk(2, dim=1)
    conved = causal_conv1d_fn(x, conv1d_weight.flatten(1), conv1d_bias, activation="silu")
    assert isinstance(conved, Tensor)
    found = F.linear(conved.transpose(1, 2), x_proj_weight)  # (b, l, r + 2 n)
    delta, b, c = torch.split(found, [rank, states, states], dim=-1)
    if B_proj_bias is not None:
        b = b + B_proj_bias.to(b.dtype)
    if C_proj_bias is not None:
        c = c + C_proj_bias.to(c.dtype)
    b, c, delta = (
        v if weight is None else rmsnorm_fn(v, weight, None, eps=b_c_dt_rms_eps)
        for v, weight in ((b, b_rms_weight), (c, c_rms_weight), (delta, dt_rms_weight))
    )
    y = selective_scan_fn(
        conved,
        F.linear(delta, delta_proj_weight).transpose(1, 2),
        A,
        b.transpose(1, 2) if B is None else B,
        c.transpose(1, 2) if C is None else C,
        D,
        z,
        delta_bias,
        delta_softplus,
    )
    assert isinstance(y, Tensor)
    return y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _ANY,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
    *,
    norm_groups: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 block behind its first projection.

    Args:
        zxbcdt: (b, l, 2 m + 2 h p + 2 g n + h): m channels of a gated MLP twice, the gate, the input of the scan with B
            and C, the steps.
        conv1d_weight: (h p + 2 g n, w).
        conv1d_bias: (h p + 2 g n,).
        dt_bias: (h,).
        A: (h,).
        D: (h,), or (h, p).
        chunk_size: Of the GPU kernel.
        initial_states: (b, h, p, n).
        seq_idx: Refused.
        dt_limit: The least and greatest step.
        return_final_states: Whether to return the state after the last step, (b, h, p, n), too.
        activation: Of the convolution.
        rmsnorm_weight: (h p,) of the norm with a gate; without it the scan is gated.
        rmsnorm_eps: Of that norm.
        outproj_weight: (out, m + h p).
        outproj_bias: (out,).
        headdim: p, where D does not say it.
        ngroups: g.
        norm_before_gate: Whether the norm comes before its gate.
        state_dtype: Of the states between the kernel's chunks.
        norm_groups: Groups of channels that are normalised apart; g if it is not given.

    Returns:
        (b, l, out).
    """
    refuse_arguments("mamba_split_conv1d_scan_combined", seq_idx=seq_idx)
    heads = D.shape[0]
    size = headdim if D.dim() == 1 else D.shape[1]
    assert size is not None, "headdim is needed where D has one number a head"
    inner = heads * size
    states = (conv1d_weight.shape[0] - inner) // ngroups // 2
    wide = inner + 2 * ngroups * states
    beside = (zxbcdt.shape[-1] - inner - wide - heads) // 2
    mlp, z, xbc, dt = torch.split(zxbcdt, [2 * beside, inner, wide, heads], dim=-1)
    conved = causal_conv1d_fn(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation)
    assert isinstance(conved, Tensor)
    x, b, c = torch.split(conved.transpose(1, 2), [inner, ngroups * states, ngroups * states], dim=-1)
    gate = None if rmsnorm_weight is not None else torch.unflatten(z, -1, (heads, size))
    found = mamba_chunk_scan_combined(
        torch.unflatten(x, -1, (heads, size)),
        dt,
        A,
        torch.unflatten(b, -1, (ngroups, states)),
        torch.unflatten(c, -1, (ngroups, states)),
        chunk_size,
        D=D,
        z=gate,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y, last = found[0].flatten(2), found[1]
    if rmsnorm_weight is not None:
        apart = inner // (norm_groups or ngroups)
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, apart, norm_before_gate)
    if beside:
        first, second = mlp.chunk(2, dim=-1)
        y = torch.cat([F.silu(first) * second, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, last) if return_final_states else y


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = _ANY,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """`mamba_split_conv1d_scan_combined` from zeros, with one norm over all groups, as the package has it."""
    y = mamba_split_conv1d_scan_combined(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, dt_limit=dt_limit, activation=activation,
        rmsnorm_weight=rmsnorm_weight, rmsnorm_eps=rmsnorm_eps, outproj_weight=outproj_weight,
        outproj_bias=outproj_bias, headdim=headdim, ngroups=ngroups, norm_before_gate=norm_before_gate,
        norm_groups=1,
    )  # fmt: skip
    assert isinstance(y, Tensor)
    return y


def mamba_conv1d_scan_ref(
    xBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _ANY,
    activation: str | None = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """Mamba-2's convolution and scan: (b, l, h p + 2 g n) → (b, l, h p); z is (b, l, h p)."""
    heads = dt.shape[2]
    if z is not None:
        headdim = z.shape[-1] // heads
    elif D is not None and D.dim() == 2:
        headdim = D.shape[1]
    assert headdim is not None, "headdim is needed without z, where D has one number a head"
    inner = heads * headdim
    conved = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation)
    assert isinstance(conved, Tensor)
    states = (xBC.shape[-1] - inner) // ngroups // 2
    x, b, c = torch.split(conved.transpose(1, 2), [inner, ngroups * states, ngroups * states], dim=-1)
    gate = None if z is None else torch.unflatten(z, -1, (heads, headdim))
    b, c = (torch.unflatten(v, -1, (ngroups, states)) for v in (b, c))
    heads_of_x = torch.unflatten(x, -1, (heads, headdim))
    return ssd_selective_scan(heads_of_x, dt, A, b, c, D, gate, dt_bias, dt_softplus, dt_limit).flatten(2)
