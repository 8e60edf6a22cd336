"""Mamba's scans, as plain PyTorch with the same arguments and results.

Each is a loop over time, one step after the other, which `recurrence` folds; what a graph then does is decided there,
not here. The packages' reference functions compute the same values in the same form of arguments, and so are the same
functions here.

Source: the papers (Mamba, arXiv:2312.00752, algorithm 2; Mamba-2, arXiv:2405.21060) and the packages' documented
signatures, https://github.com/state-spaces/mamba and https://github.com/MzeroMiko/VMamba.

Letters: b batch, l length, d channels, n state size, h heads, p size of a head, g groups of heads, r heads a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.kernels.refusals import refuse_arguments


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    """Step sizes in float32."""
    dt = dt.float()
    if bias is not None:
        dt = dt + bias.float()
    if softplus:
        dt = F.softplus(dt)
    if limit != (0.0, float("inf")):
        dt = dt.clamp(*limit)
    return dt


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's scan: `h(t) = exp(delta A) h(t-1) + delta B u(t)`, `y(t) = C h(t) + D u(t)`, times silu(z).

    Args:
        u: (b, d, l).
        delta: (b, d, l).
        A: (d, n), real.
        B: (d, n), the same in each step; (b, n, l); or (b, g, n, l).
        C: As B.
        D: (d,).
        z: (b, d, l).
        delta_bias: (d,).
        delta_softplus: Whether the steps are softplus(delta + delta_bias).
        return_last_state: Whether to return the state after the last step, (b, d, n), too.

    Returns:
        y: (b, d, l), in the dtype of u.
    """
    if A.is_complex():
        raise NotExportableError(
            "selective_scan_fn with a complex A has no ONNX form", code=Code.COMPLEX, hint="use a real A"
        )
    batch, channels, _ = u.shape
    states = A.shape[1]
    groups = next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
    size = channels // groups
    bias = None if delta_bias is None else delta_bias[:, None]
    dt = _steps(delta, bias, delta_softplus, (0.0, float("inf"))).transpose(1, 2)  # (b, l, d)
    x = u.float().transpose(1, 2)
    dt, x = (v.reshape(*v.shape[:2], groups, size) for v in (dt, x))  # (b, l, g, d/g)
    b, c = (_over_time(v.float(), groups) for v in (B, C))
    a = A.float().reshape(groups, size, states)
    h = x.new_zeros(batch, groups, size, states)
    ys = []
    for t in range(u.shape[2]):
        bt, ct = (v if v.dim() == 3 else v[:, t, :, None] for v in (b, c))  # (g, d/g, n) or (b, g, 1, n)
        h = torch.exp(dt[:, t, :, :, None] * a) * h + (dt[:, t] * x[:, t])[..., None] * bt
        ys.append((h * ct).sum(-1))
    y = torch.stack(ys, dim=1).flatten(2).transpose(1, 2)  # (b, d, l)
    if D is not None:
        y = y + u.float() * D.float()[:, None]
    if z is not None:
        y = y * F.silu(z.float())
    y = y.to(u.dtype)
    return (y, h.flatten(1, 2)) if return_last_state else y


def grouped(v: Tensor, axis: int, groups: int) -> Tensor:
    """An axis as two: groups, and what is in each."""
    return v.reshape(*v.shape[:axis], groups, v.shape[axis] // groups, *v.shape[axis + 1 :])


def _over_time(v: Tensor, groups: int) -> Tensor:
    """B or C as (b, l, g, n), or as (g, d/g, n) where it is the same in each step."""
    if v.dim() == 2:
        return v.reshape(groups, -1, v.shape[1])
    v = v if v.dim() == 4 else v[:, None]
    return v.permute(0, 3, 1, 2)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's scan: a decay a head, `h(t) = exp(dt A) h(t-1) + dt x(t) B(t)`, `y(t) = h(t) C(t) + D x(t)`.

    Args:
        x: (b, l, h, p).
        dt: (b, l, h).
        A: (h,).
        B: (b, l, g, n).
        C: (b, l, g, n).
        chunk_size: Of the GPU kernel; any length is right here.
        D: (h,) or (h, p).
        z: (b, l, h, p), the gate.
        dt_bias: (h,).
        initial_states: (b, h, p, n).
        seq_idx: Refused, as cu_seqlens and return_varlen_states are.
        cu_seqlens: Refused.
        dt_softplus: Whether the steps are softplus(dt + dt_bias).
        dt_limit: The least and greatest step.
        return_final_states: Whether to return the state after the last step, (b, h, p, n), too.
        return_varlen_states: Refused.
        state_dtype: Of the states between the kernel's chunks; there are none here.

    Returns:
        y: (b, l, h, p), in the dtype of x.
    """
    refuse_arguments(
        "mamba_chunk_scan_combined", seq_idx=seq_idx, cu_seqlens=cu_seqlens, states=return_varlen_states
    )
    batch, _, heads, size = x.shape
    groups, states = B.shape[2:]
    each = heads // groups
    dt = _steps(dt, dt_bias, dt_softplus, tuple(dt_limit))  # type: ignore[arg-type]
    dt = grouped(dt, 2, groups)  # (b, l, g, r)
    v = grouped(x.float(), 2, groups)  # (b, l, g, r, p)
    b, c = B.float(), C.float()
    a = A.float().reshape(groups, each)
    if initial_states is None:
        h = v.new_zeros(batch, groups, each, size, states)
    else:
        h = grouped(initial_states.float(), 1, groups)
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * a)[..., None, None]
        h = decay * h + (dt[:, t, :, :, None] * v[:, t])[..., None] * b[:, t, :, None, None]
        ys.append((h * c[:, t, :, None, None]).sum(-1))
    y = torch.stack(ys, dim=1).flatten(2, 3)  # (b, l, h, p)
    if D is not None:
        y = y + x.float() * (D.float() if D.dim() == 2 else D.float()[:, None])
    if z is not None:
        y = y * F.silu(z.float())
    y = y.to(x.dtype)
    return (y, h.flatten(1, 2)) if return_final_states else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the scan; `state` is changed in place.

    Args:
        state: (b, d, n) or (b, h, p, n).
        x: (b, d) or (b, h, p); so are dt and z.
        dt: See x.
        A: (d, n) or (h, p, n).
        B: (b, n) or (b, g, n).
        C: As B.
        D: (d,) or (h, p).
        z: See x.
        dt_bias: (d,) or (h, p).
        dt_softplus: Whether the steps are softplus(dt + dt_bias).
        state_batch_indices: Refused.

    Returns:
        y: As x.
    """
    refuse_arguments("selective_state_update", state_batch_indices=state_batch_indices)
    heads = state.dim() == 4
    steps = _steps(dt, dt_bias, dt_softplus, (0.0, float("inf")))
    if heads and B.dim() == 3:
        each = state.shape[1] // B.shape[1]
        b, c = (v.float().repeat_interleave(each, dim=1)[:, :, None] for v in (B, C))  # (b, h, 1, n)
    else:
        b, c = (v.float().reshape(v.shape[0], *[1] * (state.dim() - 2), v.shape[-1]) for v in (B, C))
    new = torch.exp(steps[..., None] * A.float()) * state.float() + (steps * x.float())[..., None] * b
    state.copy_(new.to(state.dtype))
    y = (new * c).sum(-1)
    if D is not None:
        y = y + x.float() * D.float()
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(x.dtype)


selective_scan_ref = selective_scan_fn
selective_state_update_ref = selective_state_update


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan_combined` from a state of zeros, which is not returned."""
    y = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus)
    assert isinstance(y, Tensor)
    return y


ssd_chunk_scan_combined_ref = mamba_chunk_scan


def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """Mamba-2's scan where steps and decays may differ within a head.

    Args:
        x: (b, l, h, p).
        dt: (b, l, h) or (b, l, h, p).
        A: (h,) or (h p, n).
        B: (b, l, g, n); so is C.
        C: See B.
        D: (h,) or (h, p).
        z: (b, l, h, p), the gate.
        dt_bias: (h,) or (h, p).
        dt_softplus: Whether the steps are softplus(dt + dt_bias).
        dt_limit: The least and greatest step.

    Returns:
        y: (b, l, h, p).
    """
    _, _, heads, size = x.shape
    one_decay = dt.dim() == 3 and A.dim() == 1 and (dt_bias is None or dt_bias.dim() == 1)
    if one_decay:
        y = mamba_chunk_scan_combined(
            x, dt, A, B, C, 0, D, z, dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit
        )
        assert isinstance(y, Tensor)
        return y

    def each(v: Tensor | None, axis: int) -> Tensor | None:
        """A number a head as one a channel."""
        if v is None:
            return None
        wide = v if v.dim() == axis + 2 else v.unsqueeze(-1).expand(*v.shape, size)
        return wide.flatten(axis, axis + 1)

    steps = each(dt, 2)
    assert steps is not None
    steps = _steps(steps, each(dt_bias, 0), dt_softplus, tuple(dt_limit))  # type: ignore[arg-type]
    decay = A if A.dim() == 2 else A.repeat_interleave(size)[:, None].expand(-1, B.shape[-1])
    found = selective_scan_fn(
        x.flatten(2).transpose(1, 2),
        steps.transpose(1, 2),
        decay,
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        each(D, 0),
        None if z is None else z.flatten(2).transpose(1, 2),
    )
    assert isinstance(found, Tensor)
    return torch.unflatten(found.transpose(1, 2), -1, (heads, size))
