"""Causal convolutions a channel, as plain PyTorch with the kernels' arguments and results.

Source: the packages' documented signatures, https://github.com/Dao-AILab/causal-conv1d and
https://github.com/fla-org/flash-linear-attention.

Letters: b batch, l length, d channels, w taps of the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_export.export.frontend.kernels.refusals import refuse_arguments

_SILU = ("silu", "swish")


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
    refuse_arguments("causal_conv1d_fn", seq_idx=seq_idx)
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
    refuse_arguments(
        "causal_conv1d_update", cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices
    )
    steps = x[..., None] if x.dim() == 2 else x
    kept, width = conv_state.shape[-1], weight.shape[1]
    whole = torch.cat([conv_state.to(x.dtype), steps], dim=-1)
    conv_state.copy_(whole[..., whole.shape[-1] - kept :])
    window = whole[..., kept - (width - 1) :]
    y = F.conv1d(window.to(weight.dtype), weight[:, None], bias, groups=weight.shape[0])
    y = (F.silu(y) if activation in _SILU else y).to(x.dtype)
    return y[..., 0] if x.dim() == 2 else y


causal_conv1d_ref = causal_conv1d_fn
causal_conv1d_update_ref = causal_conv1d_update


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same with time in the middle, (b, l, d), and states of w inputs, (b, d, w), as `fla.modules` has it."""
    options.pop("chunk_indices", None)
    refuse_arguments("causal_conv1d", cu_seqlens=cu_seqlens, **options)
    width = weight.shape[1]
    steps = x.transpose(1, 2)
    before = steps.new_zeros(*steps.shape[:2], width) if initial_state is None else initial_state.to(x.dtype)
    y = causal_conv1d_fn(steps, weight, bias, initial_states=before[..., 1:], activation=activation)
    assert isinstance(y, Tensor)
    out = y.transpose(1, 2)
    out = out if residual is None else out + residual
    whole = torch.cat([before, steps], dim=-1)
    return out, whole[..., whole.shape[-1] - width :] if output_final_state else None


class ShortConvolution(nn.Conv1d):
    """`causal_conv1d` with a weight of its own."""

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str | None = "triton",
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(
            hidden_size,
            hidden_size,
            kernel_size,
            groups=hidden_size,
            padding=kernel_size - 1,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.hidden_size, self.activation, self.backend = hidden_size, activation, backend

    def forward(  # type: ignore[override]  # the package's own arguments
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(b, l, d) → (b, l, d), and the last w inputs if they are asked for; one step changes its cache in place."""
        if mask is not None:
            x = x * mask[..., None]
        y, last = causal_conv1d(
            x,
            self.weight[:, 0],
            self.bias,
            residual,
            cache,
            True,
            self.activation,
            None,
            cu_seqlens,
            **options,
        )
        assert last is not None
        if cache is not None and x.shape[1] == 1:
            cache.copy_(last)
            last = cache
        return y, last if output_final_state else None
