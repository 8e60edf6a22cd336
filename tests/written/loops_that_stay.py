"""Loops over time that are no recurrence from step to step, with what is said of them and a word of the line."""

from __future__ import annotations

import torch
from torch import Tensor, nn

L = 10


class HalfWayBack(nn.Module):
    """Every step reads the value of half as many steps."""

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor] = []
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t])
            states.append(h)
            h = h + states[t // 2].exp()
        return h


class AllBefore(nn.Module):
    """Every step reads all steps before it."""

    def forward(self, x: Tensor) -> Tensor:
        ys = [x[:, 0]]
        for t in range(1, x.shape[1]):
            ys.append(torch.stack(ys, dim=1).mean(1) * x[:, t])
        return torch.stack(ys, dim=1)


class Alternating(nn.Module):
    """Even and odd steps do other things."""

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = torch.sin(h * x[:, t]) if t % 2 else torch.tanh(h)
        return h


class Counted(nn.Module):
    """A number of each step that follows no formula."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t] * (1.5 + t * t % 7))
        return h


def example() -> tuple[Tensor, ...]:
    return (torch.randn(2, L, 4, generator=torch.Generator().manual_seed(0)),)


LOOPS: dict[str, tuple[nn.Module, tuple[Tensor, ...], str, str | None]] = {
    "half_way_back": (HalfWayBack(), example(), r"step 3 reads step 1's value", "states[t // 2]"),
    "all_before": (AllBefore(), example(), "cannot be folded", None),
    "alternating": (Alternating(), example(), "cannot be folded", None),
    "counted": (
        Counted(),
        example(),
        r"step 0 computes with 1\.5, step 1 with 2\.5, and no formula",
        "t * t % 7",
    ),
}
