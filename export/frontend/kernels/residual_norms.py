"""Normalisation of a sum with a residual, which is handed on: Add → Norm in one call.

    y, residual = layer_norm_fn(x, weight, bias, residual=residual, prenorm=True, is_rms_norm=True)

Source: the packages' documented signatures, `layer_norm` of https://github.com/state-spaces/mamba and
https://github.com/fla-org/flash-linear-attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_export.export.frontend.kernels.refusals import refuse_arguments


def add_and_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    residual_in_fp32: bool,
    rms: bool,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm in the dtype of x, the same in float32 without weight and bias, and the sum as the next residual."""
    total = x.float() if residual is None else x.float() + residual.float()
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    y = total if groups == 1 else torch.unflatten(total, -1, (groups, -1))
    if not rms:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    plain = y if groups == 1 else y.flatten(-2)
    return scaled(plain, weight, bias).to(x.dtype), plain, total.to(kept)


def scaled(plain: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A norm times its weight, plus its bias, in float32."""
    y = plain if weight is None else plain * weight.float()
    return y if bias is None else y + bias.float()


def layer_norm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The norm of x, or of x + x1, plus the residual.

    Args:
        x: (…, d).
        weight: (d,).
        bias: (d,).
        residual: (…, d), added before.
        x1: (…, d), added before.
        weight1: Of a second norm of the same sum.
        bias1: Of that norm.
        eps: Under the root.
        dropout_p: Refused unless 0: a graph drops nothing.
        rowscale: (…), factors of x.
        prenorm: Whether to return the sum, too.
        residual_in_fp32: Whether a first residual is float32.
        is_rms_norm: Whether the mean stays.
        return_dropout_mask: Refused.

    Returns:
        The norm; behind it the second norm and the sum, where they are asked for.
    """
    refuse_arguments("layer_norm_fn", dropout_p=dropout_p or None, return_dropout_mask=return_dropout_mask)
    if rowscale is not None:
        x = x * rowscale[..., None]
    if x1 is not None:
        x = x + x1
    y, plain, total = add_and_norm(x, weight, bias, residual, eps, residual_in_fp32, is_rms_norm)
    found = (y,) if weight1 is None else (y, scaled(plain, weight1, bias1).to(x.dtype))
    found = (*found, total) if prenorm else found
    return found if len(found) > 1 else y


_fixed: Callable[..., Tensor | tuple[Tensor, ...]] = layer_norm_fn


def rms_norm_fn(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *more: Any, **options: Any
) -> Tensor | tuple[Tensor, ...]:
    """`layer_norm_fn` that leaves the mean where it is."""
    return _fixed(x, weight, bias, *more, is_rms_norm=True, **options)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *more: Any,
    rms: bool,
    upcast: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    return _fixed(x, weight, bias, *more, is_rms_norm=rms, **options)


layer_norm_ref, rms_norm_ref = partial(_reference, rms=False), partial(_reference, rms=True)


class RMSNorm(nn.Module):
    """`rms_norm_fn` with a weight of its own."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """(…, d) → (…, d), and the sum if `prenorm`."""
        dropped = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual,
            eps=self.eps,
            dropout_p=dropped,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )
