"""Delta rules, decays for each key and what else is read beside a state, as models write them. Tiny.

Letters: b batch, l length, h heads, n the keys' axis, that is read over, p the values'.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from linear_loops import LOOPS as DECAYS
from linear_loops import B, H, L, N, P, PerEntry, positive, randn
from torch import Tensor, nn


class OverTime(nn.Module):
    """A loop over its step."""

    def __init__(self, step: Callable[..., tuple[Tensor, Tensor]], transposed: bool = False) -> None:
        super().__init__()
        self.step, self.transposed = step, transposed

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        k = F.normalize(k, dim=-1)
        rows, columns = (v.shape[-1], k.shape[-1]) if self.transposed else (k.shape[-1], v.shape[-1])
        s = q.new_zeros(q.shape[0], q.shape[2], rows, columns)
        ys = []
        for t in range(q.shape[1]):
            s, y = self.step(s, q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t])
            ys.append(y)
        return torch.stack(ys, 1), s


def gated_delta(s, q, k, v, g, beta):
    """As transformers' Qwen3-Next writes it."""
    s = s * g.mean(-1).exp()[..., None, None]
    held = (s * k.unsqueeze(-1)).sum(-2)
    s = s + k.unsqueeze(-1) * ((v - held) * beta).unsqueeze(-2)
    return s, (s * q.unsqueeze(-1)).sum(-2)


def delta(s, q, k, v, g, beta):
    """Without decay, in einsums."""
    u = beta * (v - torch.einsum("bhnp,bhn->bhp", s, k))
    s = s + torch.einsum("bhn,bhp->bhnp", k, u)
    return s, torch.einsum("bhnp,bhn->bhp", s, q)


def delta_key_scaled(s, q, k, v, g, beta):
    """The rate on the key that is stored under."""
    held = torch.einsum("bhnp,bhn->bhp", s, k)
    s = s + (beta * k)[..., None] * (v - held)[..., None, :]
    return s, torch.einsum("bhnp,bhn->bhp", s, q)


def multiplied_out(s, q, k, v, g, beta):
    """alpha (s - beta k k^T s) + beta k v^T, the order of the paper."""
    alpha = torch.sigmoid(g.mean(-1))[..., None, None]
    held = torch.einsum("bhnp,bhn->bhp", s, k)
    forgotten = torch.einsum("bhn,bhp->bhnp", beta * k, held)
    s = alpha * (s - forgotten) + torch.einsum("bhn,bhp->bhnp", beta * k, v)
    return s, torch.einsum("bhnp,bhn->bhp", s, q)


def online_gradient(s, q, k, v, g, beta):
    """A step down the gradient of (s k - v)^2 / 2; the state's axes the other way round."""
    error = (s @ k.unsqueeze(-1)).squeeze(-1) - v
    s = s - beta.unsqueeze(-1) * error.unsqueeze(-1) * k.unsqueeze(-2)
    return s, (s @ q.unsqueeze(-1)).squeeze(-1)


def delta_decay_a_key(s, q, k, v, g, beta):
    """A decay for each key."""
    s = torch.sigmoid(g).unsqueeze(-1) * s
    held = (s * k.unsqueeze(-1)).sum(-2)
    s = s + beta.unsqueeze(-1) * k.unsqueeze(-1) * (v - held).unsqueeze(-2)
    return s, (s * q.unsqueeze(-1)).sum(-2)


def decay_a_key(s, q, k, v, g, beta):
    """Gated linear attention (arXiv:2312.06635)."""
    s = torch.sigmoid(g).unsqueeze(-1) * s + k.unsqueeze(-1) * v.unsqueeze(-2)
    return s, torch.einsum("bhn,bhnp->bhp", q, s)


def with_bonus(s, q, k, v, g, beta):
    """RWKV-6 (arXiv:2404.05892): the step's own value is read with another weight, before it is added."""
    bonus = torch.linspace(0.1, 0.7, H * N).view(H, N, 1)
    kv = k.unsqueeze(-1) @ v.unsqueeze(-2)
    y = (q.unsqueeze(-2) @ (s + bonus * kv)).squeeze(-2)
    return torch.exp(-torch.exp(g)).unsqueeze(-1) * s + kv, y


def half_read_before(s, q, k, v, g, beta):
    """Read before it is stored in, from a state without decay."""
    y = (q.unsqueeze(-2) @ s).squeeze(-2)
    return s + k.unsqueeze(-1) * v.unsqueeze(-2), y


def rate_a_value(s, q, k, v, g, beta):
    """A rate for each value makes heads of the values."""
    held = (s * k.unsqueeze(-1)).sum(-2)
    s = s + k.unsqueeze(-1) * ((v - held) * torch.sigmoid(v)).unsqueeze(-2)
    return s, (s * q.unsqueeze(-1)).sum(-2)


def other_key(s, q, k, v, g, beta):
    """Stored under another key than read."""
    held = (s * q.unsqueeze(-1)).sum(-2)
    s = s + k.unsqueeze(-1) * (v - held).unsqueeze(-2)
    return s, (s * q.unsqueeze(-1)).sum(-2)


def held_is_handed_out(s, q, k, v, g, beta):
    """The correction is a result."""
    held = (s * k.unsqueeze(-1)).sum(-2)
    s = s + k.unsqueeze(-1) * (v - held).unsqueeze(-2)
    return s, (s * q.unsqueeze(-1)).sum(-2) + held


def added_instead(s, q, k, v, g, beta):
    """The sign is the other one."""
    held = (s * k.unsqueeze(-1)).sum(-2)
    s = s + 0.1 * k.unsqueeze(-1) * (v + held).unsqueeze(-2)
    return s, (s * q.unsqueeze(-1)).sum(-2)


def forgets_after_reading(s, q, k, v, g, beta):
    """Reads the state as it was, stores in the decayed one: the difference is no delta rule of that state."""
    held = (s * k.unsqueeze(-1)).sum(-2)
    s = torch.sigmoid(g).unsqueeze(-1) * s + k.unsqueeze(-1) * (v - held).unsqueeze(-2)
    return s, (s * q.unsqueeze(-1)).sum(-2)


_INPUTS = (
    randn(B, L, H, N),
    randn(B, L, H, N) + 1,
    randn(B, L, H, P),
    randn(B, L, H, N),
    0.9 * torch.sigmoid(randn(B, L, H, 1)),
)

LOOPS: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    "gated_delta": (OverTime(gated_delta), _INPUTS, "gated_delta"),
    "delta": (OverTime(delta), _INPUTS, "delta"),
    "delta_key_scaled": (OverTime(delta_key_scaled), _INPUTS, "delta"),
    "multiplied_out": (OverTime(multiplied_out), _INPUTS, "gated_delta"),
    "online_gradient": (OverTime(online_gradient, transposed=True), _INPUTS, "delta"),
    "delta_decay_a_key": (OverTime(delta_decay_a_key), _INPUTS, "gated_delta"),
    "decay_a_key": (OverTime(decay_a_key), _INPUTS, "gated"),
    "with_bonus": (OverTime(with_bonus), _INPUTS, "gated"),
    "rate_a_value": (OverTime(rate_a_value), _INPUTS, "delta"),
    "per_entry": (PerEntry(), (randn(B, L, P), positive(B, L, P, N), randn(B, L, N)), "gated"),
    "half_read_before": (OverTime(half_read_before), _INPUTS, "linear"),
    **{name: (*DECAYS[name], "linear" if name == "linear_attention" else "gated") for name in DECAYS},
}
"""A module, its inputs, and the operator's update rule."""

REFUSED: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    "other_key": (OverTime(other_key), _INPUTS, "stores under another key"),
    "held_is_handed_out": (OverTime(held_is_handed_out), _INPUTS, "returned, too"),
    "many_small_heads": (
        PerEntry(64),
        (randn(B, L, 64), positive(B, L, 64, N), randn(B, L, N)),
        "many small heads",
    ),
    "added_instead": (OverTime(added_instead), _INPUTS, "is not subtracted"),
    "forgets_after_reading": (
        OverTime(forgets_after_reading),
        _INPUTS,
        "forgets after it has read|another key",
    ),
}
