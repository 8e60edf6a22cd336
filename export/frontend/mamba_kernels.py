"""The kernels that Mamba models call on a GPU, as plain PyTorch with the same arguments and results.

Where `mamba_ssm` or `causal_conv1d` is not installed, a model file that imports these names gets the forms below
(`kernel_shims`), so that it runs, traces and exports on any machine. Each is a loop over time, one step after the
other, which `recurrence` folds; what a graph then does is decided there, not here.

Source: the papers (Mamba, arXiv:2312.00752, algorithm 2; Mamba-2, arXiv:2405.21060) and the packages' documented
signatures, https://github.com/state-spaces/mamba and https://github.com/Dao-AILab/causal-conv1d.

Letters: b batch, l length, d channels, n state size, h heads, p size of a head, g groups of heads, r heads a group,
w taps of the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_export.errors import NotExportableError

_SILU = ("silu", "swish")


def _refuse(kernel: str, **arguments: Any) -> None:
    """Arguments that only make sense for packed sequences on a GPU."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotExportableError(
                f"{kernel}({name}=...) has no form outside of the GPU kernel",
                hint=f"export the model with {name} left at its default: one sequence a row",
            )


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


def selective_scan_fn(  # noqa: PLR0913, PLR0917  the package's own arguments
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
        raise NotExportableError("selective_scan_fn with a complex A has no ONNX form", hint="use a real A")
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


def _grouped(v: Tensor, axis: int, groups: int) -> Tensor:
    """An axis as two: groups, and what is in each."""
    return v.reshape(*v.shape[:axis], groups, v.shape[axis] // groups, *v.shape[axis + 1 :])


def _over_time(v: Tensor, groups: int) -> Tensor:
    """B or C as (b, l, g, n), or as (g, d/g, n) where it is the same in each step."""
    if v.dim() == 2:
        return v.reshape(groups, -1, v.shape[1])
    v = v if v.dim() == 4 else v[:, None]
    return v.permute(0, 3, 1, 2)


def mamba_chunk_scan_combined(  # noqa: PLR0913, PLR0917  the package's own arguments
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

    Returns:
        y: (b, l, h, p), in the dtype of x.
    """
    _refuse("mamba_chunk_scan_combined", seq_idx=seq_idx, cu_seqlens=cu_seqlens, states=return_varlen_states)
    batch, _, heads, size = x.shape
    groups, states = B.shape[2:]
    each = heads // groups
    dt = _steps(dt, dt_bias, dt_softplus, tuple(dt_limit))  # type: ignore[arg-type]
    dt = _grouped(dt, 2, groups)  # (b, l, g, r)
    v = _grouped(x.float(), 2, groups)  # (b, l, g, r, p)
    b, c = B.float(), C.float()
    a = A.float().reshape(groups, each)
    if initial_states is None:
        h = v.new_zeros(batch, groups, each, size, states)
    else:
        h = _grouped(initial_states.float(), 1, groups)
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


def selective_state_update(  # noqa: PLR0913, PLR0917  the package's own arguments
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

    Returns:
        y: As x.
    """
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


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A convolution a channel over what was and is: `y(t) = sum over i of weight(i) x(t - w + 1 + i)`.

    Args:
        x: (b, d, l).
        weight: (d, w).
        bias: (d,).
        seq_idx: Refused.
        initial_states: (b, d, w - 1), what was before the first step; zeros if it is not given.
        return_final_states: Whether to return the last w - 1 inputs, (b, d, w - 1), too.
        final_states_out: Where these are written as well.
        activation: None, `silu` or `swish`.

    Returns:
        y: (b, d, l).
    """
    _refuse("causal_conv1d_fn", seq_idx=seq_idx)
    width = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states.to(x.dtype)
    whole = torch.cat([before, x], dim=-1)
    y = F.conv1d(whole.to(weight.dtype), weight[:, None], bias, groups=weight.shape[0])
    y = (F.silu(y) if activation in _SILU else y).to(x.dtype)
    if not return_final_states:
        return y
    last = whole[..., whole.shape[-1] - (width - 1) :]
    if final_states_out is not None:
        final_states_out.copy_(last)
    return y, last


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The same for the next steps; `conv_state` is changed in place.

    Args:
        x: (b, d) for one step, or (b, d, l).
        conv_state: (b, d, at least w - 1), the inputs before.
        weight: (d, w).
        bias: (d,).
        activation: None, `silu` or `swish`.
        cache_seqlens: Refused.
        conv_state_indices: Refused.

    Returns:
        y: As x.
    """
    _refuse("causal_conv1d_update", cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    steps = x[..., None] if x.dim() == 2 else x
    kept, width = conv_state.shape[-1], weight.shape[1]
    whole = torch.cat([conv_state.to(x.dtype), steps], dim=-1)
    conv_state.copy_(whole[..., whole.shape[-1] - kept :])
    window = whole[..., kept - (width - 1) :]
    y = F.conv1d(window.to(weight.dtype), weight[:, None], bias, groups=weight.shape[0])
    y = (F.silu(y) if activation in _SILU else y).to(x.dtype)
    return y[..., 0] if x.dim() == 2 else y


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Root mean square normalisation with a gate silu(z), before or behind it; a group of channels at a time."""
    y = x.float()
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.float())
    groups = _grouped(y, y.dim() - 1, y.shape[-1] // group_size) if group_size else y
    groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)
    y = (groups.flatten(-2) if group_size else groups) * weight.float()
    if bias is not None:
        y = y + bias.float()
    if z is not None and norm_before_gate:
        y = y * F.silu(z.float())
    return y.to(x.dtype)


class RMSNorm(nn.Module):
    """`rmsnorm_fn` with a weight of its own."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """(…, d) → (…, d)."""
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
