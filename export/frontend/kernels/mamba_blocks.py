"""`Mamba`, `Mamba2` and `Mamba2Simple`: the blocks that `mamba_ssm` has, with its parameters and their names.

A checkpoint of the package's block loads into these. One token at a time goes through `step`, with the states as
tensors; the cache that the package's generation loop carries (`inference_params`) is refused.

Source: the papers (Mamba, arXiv:2312.00752, section 3.4; Mamba-2, arXiv:2405.21060, section 7) and the package's
documented arguments, https://github.com/state-spaces/mamba.

Letters: b batch, l length, m model size, d channels, n state size, r rank of the steps, h heads, p size of a head,
g groups of heads, w taps of the convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_export.export.frontend.kernels.convolutions import causal_conv1d_update
from moe_export.export.frontend.kernels.gated_norms import RMSNorm
from moe_export.export.frontend.kernels.mamba_inner import mamba_inner_fn, mamba_split_conv1d_scan_combined
from moe_export.export.frontend.kernels.refusals import refuse_arguments
from moe_export.export.frontend.kernels.scans import selective_state_update

_ANY = (0.0, float("inf"))


def _step_bias(count: int, least: float, most: float, floor: float, made: dict[str, Any]) -> Tensor:
    """What softplus makes a step between `least` and `most` of, drawn evenly in its logarithm."""
    spread = math.log(most) - math.log(least)
    steps = torch.exp(torch.rand(count, **made) * spread + math.log(least)).clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))


class Mamba(nn.Module):
    """Mamba's block: (b, l, m) → (b, l, m)."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = int(dt_rank) if dt_rank != "auto" else math.ceil(d_model / 16)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.activation = "silu"
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            **made,
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **made)
        bound = self.dt_rank**-0.5 * dt_scale
        with torch.no_grad():
            if dt_init == "constant":
                self.dt_proj.weight.fill_(bound)
            else:
                self.dt_proj.weight.uniform_(-bound, bound)
            self.dt_proj.bias.copy_(_step_bias(self.d_inner, dt_min, dt_max, dt_init_floor, made))
        decays = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(decays.log().repeat(self.d_inner, 1))  # (d, n)
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """(b, l, m) → (b, l, m)."""
        refuse_arguments("Mamba", inference_params=inference_params)
        return mamba_inner_fn(
            self.in_proj(hidden_states).transpose(1, 2),
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            -torch.exp(self.A_log.float()),
            D=self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
        )

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (b, 1, m); both states are changed in place."""
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)  # (b, d)
        weight = self.conv1d.weight[:, 0]
        x = causal_conv1d_update(x, conv_state, weight, self.conv1d.bias, self.activation)
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_state_update(
            ssm_state,
            x,
            F.linear(dt, self.dt_proj.weight),
            -torch.exp(self.A_log.float()),
            b,
            c,
            self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
        )
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """The states before the first token: (b, d, w) and (b, d, n)."""
        weight = self.conv1d.weight
        window = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        return window, weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype)


class Mamba2(nn.Module):
    """Mamba-2's block: (b, l, m) → (b, l, m)."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = _ANY,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        refuse_arguments("Mamba2", process_group=process_group)
        made = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.activation, self.chunk_size = tuple(dt_limit), "silu", chunk_size
        self.use_mem_eff_path, self.layer_idx = use_mem_eff_path, layer_idx
        if self.d_ssm % headdim:
            raise ValueError(f"headdim={headdim} does not divide {self.d_ssm} channels")
        wide = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(
            d_model, 2 * self.d_inner + wide - self.d_ssm + self.nheads, bias=bias, **made
        )
        self.conv1d = nn.Conv1d(wide, wide, d_conv, groups=wide, padding=d_conv - 1, bias=conv_bias, **made)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(_step_bias(self.nheads, dt_min, dt_max, dt_init_floor, made))
        decays = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(decays.log().to(dtype=dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        if rmsnorm:
            self.norm = RMSNorm(
                self.d_ssm, group_size=self.d_ssm // ngroups, norm_before_gate=norm_before_gate, **made
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Any = None,
        cu_seqlens: Any = None,
        inference_params: Any = None,
    ) -> Tensor:
        """(b, l, m) → (b, l, m); with `seqlen`, (b l, m) → (b l, m)."""
        refuse_arguments("Mamba2", seq_idx=seq_idx, cu_seqlens=cu_seqlens, inference_params=inference_params)
        if seqlen is not None:
            return self._mixed(torch.unflatten(u, 0, (-1, seqlen)), None).flatten(0, 1)
        return self._mixed(u, None)

    def _mixed(self, u: Tensor, initial_states: Tensor | None) -> Tensor:
        y = mamba_split_conv1d_scan_combined(
            self.in_proj(u),
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            torch.unflatten(self.D, 0, (-1, self.headdim)) if self.D_has_hdim else self.D,
            self.chunk_size,
            initial_states,
            dt_limit=self.dt_limit,  # type: ignore[arg-type]
            activation=self.activation,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )
        assert isinstance(y, Tensor)
        return y

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (b, 1, m); both states are changed in place."""
        wide = self.conv1d.weight.shape[0]
        found = self.in_proj(hidden_states[:, 0])
        beside = (found.shape[-1] - self.d_ssm - wide - self.nheads) // 2
        first, second, z, xbc, dt = torch.split(
            found, [beside, beside, self.d_ssm, wide, self.nheads], dim=-1
        )
        weight = self.conv1d.weight[:, 0]
        xbc = causal_conv1d_update(xbc, conv_state, weight, self.conv1d.bias, self.activation)
        states = self.ngroups * self.d_state
        x, b, c = torch.split(xbc, [self.d_ssm, states, states], dim=-1)
        heads = (self.nheads, self.headdim)
        a = -torch.exp(self.A_log.float())[:, None, None].expand(*heads, self.d_state)
        skip = torch.unflatten(self.D, 0, heads) if self.D_has_hdim else self.D[:, None].expand(*heads)
        y = selective_state_update(
            ssm_state,
            torch.unflatten(x, -1, heads),
            dt[..., None].expand(-1, *heads),
            a,
            torch.unflatten(b, -1, (self.ngroups, self.d_state)),
            torch.unflatten(c, -1, (self.ngroups, self.d_state)),
            skip,
            z=None if self.rmsnorm else torch.unflatten(z, -1, heads),
            dt_bias=self.dt_bias[:, None].expand(*heads),
            dt_softplus=True,
        ).flatten(1)
        if self.rmsnorm:
            y = self.norm(y, z)
        if beside:
            y = torch.cat([F.silu(first) * second, y], dim=-1)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """The states before the first token: (b, h p + 2 g n, w) and (b, h, p, n)."""
        weight = self.conv1d.weight
        window = weight.new_zeros(batch_size, weight.shape[0], self.d_conv, dtype=dtype)
        return window, weight.new_zeros(batch_size, self.nheads, self.headdim, self.d_state, dtype=dtype)


class Mamba2Simple(Mamba2):
    """Mamba-2's block without sharding; its first state may be a parameter."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = _ANY,
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model, d_state, d_conv, conv_init, expand, headdim, None, ngroups, A_init_range, dt_min=dt_min,
            dt_max=dt_max, dt_init_floor=dt_init_floor, dt_limit=dt_limit, bias=bias, conv_bias=conv_bias,
            chunk_size=chunk_size, use_mem_eff_path=use_mem_eff_path, layer_idx=layer_idx, device=device,
            dtype=dtype,
        )  # fmt: skip
        self.activation, self.learnable_init_states = activation, learnable_init_states
        if learnable_init_states:
            shape = (self.nheads, headdim, d_state)
            self.init_states = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def forward(  # type: ignore[override]  # the package's own arguments
        self, u: Tensor, seq_idx: Any = None, **options: Any
    ) -> Tensor:
        """(b, l, m) → (b, l, m)."""
        refuse_arguments("Mamba2Simple", seq_idx=seq_idx, **options)
        start = self.init_states.expand(u.shape[0], -1, -1, -1) if self.learnable_init_states else None
        return self._mixed(u, start)
