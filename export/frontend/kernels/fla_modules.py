"""The modules that model files take from `fla.modules`, with its parameters' names.

Source: the package's documented arguments, https://github.com/fla-org/flash-linear-attention.

Letters: b batch, l length, h heads, d channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_export.export.frontend.kernels.linear_attention import l2norm
from moe_export.export.frontend.kernels.refusals import refuse_arguments
from moe_export.export.frontend.kernels.residual_norms import add_and_norm

_GATES: Mapping[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}


class _Norm(nn.Module):
    """A norm of the sum with a residual, with a weight and a bias where they are asked for."""

    rms = True
    groups = 1
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.elementwise_affine, self.eps = hidden_size, elementwise_affine, eps
        made = {"device": device, "dtype": dtype}
        weight = nn.Parameter(torch.ones(hidden_size, **made)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(hidden_size, **made)) if elementwise_affine and bias else None
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """(…, d) → (…, d), and the sum if `prenorm`."""
        y, _, total = add_and_norm(
            x, self.weight, self.bias, residual, self.eps, residual_in_fp32, self.rms, self.groups
        )
        return (y, total) if prenorm else y


class RMSNorm(_Norm):
    """Divided by the root mean square."""


class LayerNorm(_Norm):
    """The same with the mean taken off."""

    rms = False


class GroupNorm(_Norm):
    """A norm of each group of channels."""

    def __init__(
        self,
        num_groups: int,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        is_rms_norm: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, bias, eps, device, dtype)
        self.groups = self.num_groups = num_groups
        self.rms = self.is_rms_norm = is_rms_norm


class FusedRMSNormGated(_Norm):
    """A norm times a gate of another tensor."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: Any = None,
        dtype: Any = None,
        bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, bias, eps, device, dtype)
        if activation not in _GATES:
            raise ValueError(f"unknown activation {activation!r}: one of {', '.join(_GATES)}")
        self.activation = activation

    def forward(  # type: ignore[override]  # the package's own arguments
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """(…, d), (…, d) → (…, d), and the sum if `prenorm`."""
        y, total = super().forward(x.float(), residual, True, residual_in_fp32)
        y = (y * _GATES[self.activation](g.float())).to(x.dtype)
        return (y, total if residual is not None or residual_in_fp32 else x) if prenorm else y


class FusedRMSNormSwishGate(FusedRMSNormGated):
    """`FusedRMSNormGated` of a SiLU."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, eps, "swish", device, dtype)


class FusedLayerNormGated(FusedRMSNormGated):
    """`FusedRMSNormGated` with the mean taken off."""

    rms = False

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        activation: str = "swish",
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, eps, activation, device, dtype, bias)


class L2Norm(nn.Module):
    """`l2norm` as a module."""

    def __init__(self, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps, self.output_dtype = eps, output_dtype

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) → (…, d)."""
        return l2norm(x, self.eps, self.output_dtype)


l2_norm = l2norm


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) y, computed in float32."""
    return (F.silu(x.float()) * y.float()).to(x.dtype)


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`swiglu`, then a projection."""
    return F.linear(swiglu(x, y), weight, bias)


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    """Norm, then a projection; behind it the sum if `prenorm`."""
    y, _, total = add_and_norm(x, norm_weight, norm_bias, residual, eps, residual_in_fp32, rms=True)
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, total) if prenorm else out


def rms_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """Norm, gate, then a projection; behind it the sum if `prenorm`."""
    y, _, total = add_and_norm(x.float(), norm_weight, norm_bias, residual, eps, residual_in_fp32, rms=True)
    gated = (y * F.silu(g.float())).to(linear_weight.dtype)
    out = F.linear(gated, linear_weight, linear_bias)
    return (out, total) if prenorm else out


def sqrelu(x: Tensor) -> Tensor:
    """relu(x)²."""
    return F.relu(x.float()).square().to(x.dtype)


swish, sigmoid, logsigmoid = F.silu, torch.sigmoid, F.logsigmoid
ACT2FN: Mapping[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "sigmoid": sigmoid,
    "logsigmoid": logsigmoid,
    "silu": swish,
    "swish": swish,
    "sqrelu": sqrelu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) up(x))`."""

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: int | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        fuse_swiglu: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        refuse_arguments("GatedMLP", hidden_act=None if hidden_act == "swish" else hidden_act)
        if intermediate_size is None:
            wanted = int(hidden_size * (hidden_ratio or 4) * 2 / 3)
            intermediate_size = 256 * ((wanted + 255) // 256)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """(b, l, d) → (b, l, d)."""
        y: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return y


class RotaryEmbedding(nn.Module):
    """Queries and keys turned by their positions."""

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        scale_base: float | None = None,
        interleaved: bool = False,
        pos_idx_in_fp32: bool = True,
        device: Any = None,
    ) -> None:
        super().__init__()
        refuse_arguments("RotaryEmbedding", scale_base=scale_base)
        self.dim, self.interleaved = dim, interleaved
        powers = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        self.register_buffer("inv_freq", 1.0 / float(base) ** powers, persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        seqlen_offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """(b, l, h, d) each; max_seqlen is the length of the kernel's table, and there is no table here."""
        refuse_arguments("RotaryEmbedding", cu_seqlens=cu_seqlens)
        steps = torch.arange(q.shape[1], device=q.device, dtype=torch.float32)
        offset = seqlen_offset[:, None] if isinstance(seqlen_offset, Tensor) else seqlen_offset
        angles = (steps + offset)[..., None, None] * self.inv_freq  # (l, 1, d/2) or (b, l, 1, d/2)
        return self._turned(q, angles), self._turned(k, angles)

    def _turned(self, x: Tensor, angles: Tensor) -> Tensor:
        turned, rest = torch.split(x.float(), [self.dim, x.shape[-1] - self.dim], dim=-1)
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        pair = (first * cos - second * sin, first * sin + second * cos)
        whole = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        return torch.cat([whole, rest], dim=-1).to(x.dtype)


def token_shift(x: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> Tensor:
    """What was before, less what is: (b, l, d) → (b, l, d)."""
    refuse_arguments("token_shift", cu_seqlens=cu_seqlens, **options)
    return F.pad(x, (0, 0, 1, 0))[:, :-1] - x


def unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator that only matters on a GPU."""
    return function if callable(function) else unchanged
