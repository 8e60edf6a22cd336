"""Recurrences with a running maximum: xLSTM's mLSTM (arXiv:2405.04517) as papers' code writes it, and variants.

Letters: b batch, l length, h heads, n the keys' axis, that is read over, p the values'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from linear_loops import B, H, L, N, P, randn
from torch import Tensor, nn


class MLSTM(nn.Module):
    """The memory, (b, h, p, n), its normaliser and its maximum from given states; the last ones are returned."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c: Tensor, n: Tensor, m: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ys = []
        for t in range(q.shape[1]):
            most = torch.maximum(f[:, t] + m, i[:, t])
            kept, added = torch.exp(f[:, t] + m - most), torch.exp(i[:, t] - most)
            c = kept[..., None, None] * c + added[..., None, None] * (v[:, t, :, :, None] * k[:, t, :, None])
            n, m = kept[..., None] * n + added[..., None] * k[:, t], most
            below = torch.maximum((n * q[:, t]).sum(-1).abs(), torch.exp(-m))
            ys.append((c @ q[:, t, :, :, None]).squeeze(-1) / below[..., None])
        return torch.stack(ys, 1), c, n, m


class FromNothing(MLSTM):
    """From states of 0, with decays as a layer computes them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:  # type: ignore[override]
        c = q.new_zeros(*v[:, 0].shape, k.shape[-1])
        m = q.new_zeros(q.shape[0], q.shape[2])
        return super().forward(q, k, v, i, F.logsigmoid(f), c, q.new_zeros(q[:, 0].shape), m)[0]


class Backwards(MLSTM):
    """From the last step to the first; axes of size 1 beside the heads, a sum instead of a maximum below."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c: Tensor, n: Tensor, m: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m, ys = m[..., None, None], []
        for t in reversed(range(q.shape[1])):
            ahead = f[:, t, :, None, None] + m
            most = torch.max(i[:, t, :, None, None], ahead)
            kept, added = torch.exp(ahead - most), torch.exp(i[:, t, :, None, None] - most)
            c = c * kept + (v[:, t, :, :, None] @ k[:, t, :, None]) * added
            n = n * kept.squeeze(-1) + k[:, t] * added.squeeze(-1)
            m = most
            below = (n * q[:, t]).sum(-1, keepdim=True).abs() + torch.exp(-m).squeeze(-1)
            ys.append(torch.einsum("bhpn,bhn->bhp", c, q[:, t]) / below)
        return torch.stack(ys, 1), c, n, m[..., 0, 0]


class BesideTheMaximum(MLSTM):
    """What is returned of the maximum before and behind each step, too."""

    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c: Tensor, n: Tensor, m: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ys, ms = [], []
        for t in range(q.shape[1]):
            before, m = m, torch.maximum(f[:, t] + m, i[:, t])
            kept = torch.exp(f[:, t] + before - m)[..., None, None]
            c = kept * c + torch.exp(i[:, t] - m)[..., None, None] * (v[:, t, :, :, None] * k[:, t, :, None])
            ys.append((c * q[:, t, :, None]).sum(-1) + before[..., None])
            ms.append(m * 2)
        return torch.stack(ys, 1), torch.stack(ms, 2), c


MEMORIES = {"mlstm": MLSTM, "backwards": Backwards, "beside": BesideTheMaximum}


def inputs(heads: int = H, keys: int = N, values: int = P) -> dict[str, Tensor]:
    """Of a loop, as an example."""
    return {
        "q": randn(B, L, heads, keys),
        "k": randn(B, L, heads, keys),
        "v": randn(B, L, heads, values),
        "i": randn(B, L, heads),
        "f": F.logsigmoid(randn(B, L, heads) + 2),
        "c": randn(B, heads, values, keys),
        "n": randn(B, heads, keys),
        "m": randn(B, heads),
    }
