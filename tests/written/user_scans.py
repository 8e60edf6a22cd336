"""Scans as users write them for training: autograd functions in passes, whose traces hold for one length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Doubling(torch.autograd.Function):
    """h(t) = a(t) h(t - 1) + x(t), both (b, l, d, n), in log2(l) passes over spans of doubled length."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor) -> Tensor:
        ctx.save_for_backward(decay, added)
        span, length = 1, added.shape[1]
        while span < length:
            ahead = torch.zeros_like(added[:, :span])
            added = added + decay * torch.cat([ahead, added[:, :-span]], 1)
            decay = decay * torch.cat([torch.ones_like(ahead), decay[:, :-span]], 1)
            span *= 2
        return added


class AddedFirst(torch.autograd.Function):
    """The same with its arguments the other way round, time in front, in place on a copy padded to a power of two."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, decay: Tensor) -> Tensor:
        ctx.save_for_backward(decay, added)
        length = added.shape[0]
        full = 1 << (length - 1).bit_length()
        sums = torch.cat([added, added.new_zeros(full - length, *added.shape[1:])])
        left = torch.cat([decay, decay.new_zeros(full - length, *decay.shape[1:])])
        span = 1
        while span < full:
            ends = torch.arange(2 * span - 1, full, 2 * span)
            sums[ends] = sums[ends] + left[ends] * sums[ends - span]
            left[ends] = left[ends] * left[ends - span]
            span *= 2
        span = full // 4
        while span:
            ends = torch.arange(3 * span - 1, full, 2 * span)
            sums[ends] = sums[ends] + left[ends] * sums[ends - span]
            span //= 2
        return sums[:length]


class NoScan(torch.autograd.Function):
    """Of two tensors of one shape, too."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        return torch.cumsum(one * other, 1)


class Block(nn.Module):
    """A selective scan with one of them inside; x is (b, l, d)."""

    def __init__(self, function: Any, time_first: bool = False, d: int = 12, n: int = 4) -> None:
        super().__init__()
        self.scan, self.time_first = function.apply, time_first
        self.A = nn.Parameter(-torch.rand(d, n))
        self.proj = nn.Linear(d, 2 * n + d)
        self.n, self.d = n, d

    def forward(self, x: Tensor) -> Tensor:
        B, C, delta = self.proj(x).split([self.n, self.n, self.d], -1)
        delta = nn.functional.softplus(delta)[..., None]
        decay, added = torch.exp(delta * self.A), delta * B[:, :, None] * x[..., None]
        if self.time_first:
            h = self.scan(added.transpose(0, 1), decay.transpose(0, 1)).transpose(0, 1)
        else:
            h = self.scan(decay, added)
        return (h @ C[..., None]).squeeze(-1) + x
