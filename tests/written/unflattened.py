"""Experts over tokens that keep their axes, (batch, time) or (batch, height, width), as people write them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

FEATURES, EXPERTS = 12, 4


class Kept(nn.Module):
    """A gate (b, t, k) in front of experts that are called one by one."""

    def __init__(self, slots: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.slots = slots
        self.gate = nn.Linear(FEATURES, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(EXPERTS))

    def chosen(self, x):
        return self.gate(x).softmax(-1).topk(self.slots, dim=-1)


class BooleanMask(Kept):
    """`out[mask] += ...` with a mask of the tokens."""

    def forward(self, x):
        weights, indices = self.chosen(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = indices == number
            tokens = mask.any(-1)
            if tokens.any():
                out[tokens] += (weights * mask).sum(-1)[tokens].unsqueeze(-1) * expert(x[tokens])
        return out


class Places(Kept):
    """`torch.where` of the pairs, an axis each."""

    def forward(self, x):
        weights, indices = self.chosen(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            batch, time, slot = torch.where(indices == number)
            if batch.numel() == 0:
                continue
            out[batch, time] += weights[batch, time, slot, None] * expert(x[batch, time])
        return out


class Tuple(Kept):
    """`nonzero(as_tuple=True)` of the tokens, weights by `where`; rows are replaced."""

    def forward(self, x):
        weights, indices = self.chosen(x)
        out = x.new_zeros(x.shape)
        for number, expert in enumerate(self.experts):
            places = (indices == number).any(-1).nonzero(as_tuple=True)
            if len(places[0]) > 0:
                own = torch.where(indices == number, weights, 0.0).sum(-1)[places]
                out[places] = out[places] + own[:, None] * expert(x[places])
        return out


class Images(Places):
    """Pixels as tokens, and the load of the experts beside."""

    def forward(self, x):
        weights, indices = self.chosen(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = (indices == number).any(-1)
            own = (weights * (indices == number)).sum(-1)
            if mask.any():
                out[mask] += own[mask][:, None] * expert(x[mask])
        return out, F.one_hot(indices, EXPERTS).float().mean((0, 1, 2, 3))


class Top1(Kept):
    """One expert a token, found by `argmax`."""

    def forward(self, x):
        probabilities = self.gate(x).softmax(-1)
        indices = probabilities.argmax(-1)
        weights = probabilities.gather(-1, indices.unsqueeze(-1))
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = indices == number
            out[mask] = weights[mask] * expert(x[mask])
        return out


class Looked(Kept):
    """Stacked weights, looked up by the chosen experts; the slots are added up by an einsum."""

    def __init__(self, slots: int = 2) -> None:
        super().__init__(slots)
        self.weight = nn.Parameter(torch.randn(EXPERTS, FEATURES, FEATURES) / FEATURES**0.5)
        self.bias = nn.Parameter(torch.randn(EXPERTS, FEATURES))

    def forward(self, x):
        weights, indices = self.chosen(x)
        rows = torch.einsum("btd,btkdf->btkf", x, self.weight[indices]) + self.bias[indices]
        return x + torch.einsum("btk,btkf->btf", weights, rows.relu())


class LookedMatmul(Looked):
    """As before, with one expert, as products of matrices."""

    def forward(self, x):
        weight, index = self.gate(x).softmax(-1).max(-1)
        rows = x.unsqueeze(-2) @ self.weight[index]
        return rows.squeeze(-2).relu() * weight.unsqueeze(-1)


class SlotsOutside(Kept):
    """First all experts for the first choice, then for the second."""

    def forward(self, x):
        weights, indices = self.chosen(x)
        out = torch.zeros_like(x)
        for slot in range(self.slots):
            for number, expert in enumerate(self.experts):
                mask = indices[..., slot] == number
                if mask.any():
                    out[mask] += weights[..., slot][mask].unsqueeze(-1) * expert(x[mask])
        return out


class SlotsInside(Kept):
    """An expert's rows, choice by choice, on flat tokens; weights with an axis of their own, and in another type."""

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, indices = self.chosen(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            for slot in range(self.slots):
                mask = indices[:, slot] == number
                if mask.sum() > 0:
                    out[mask] += weights[:, slot].double()[:, None].float()[mask] * expert(flat[mask])
        return out.view(x.shape)


class TwoGates(Kept):
    """A choice of each of two gates, the second one's half as much."""

    def __init__(self, slots: int = 2, second: float = 1.0) -> None:
        super().__init__(slots)
        self.other, self.second = nn.Linear(FEATURES, EXPERTS), second

    def forward(self, x):
        out = torch.zeros_like(x)
        for gate, scale in ((self.gate, 1.0), (self.other, self.second)):
            weight, index = gate(x).softmax(-1).max(-1)
            for number, expert in enumerate(self.experts):
                mask = index == number
                if mask.any():
                    out[mask] += weight[mask].unsqueeze(-1) * (expert(x[mask]) * scale)
        return out


LINES = (BooleanMask, Places, Tuple, Top1, Looked, LookedMatmul, SlotsOutside, SlotsInside, TwoGates)
