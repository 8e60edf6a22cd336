"""Code that dispatches rows to several experts in ways that no rule covers."""

from __future__ import annotations

import torch
from experts_idioms import Block
from torch import nn


class ByThreshold(Block):
    """Each expert takes the tokens with a score above a threshold; nothing is chosen among the experts."""

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        scores, out = self.gate(tokens).sigmoid(), torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token = torch.where(scores[:, number] > 0.5)[0]
            out = out.index_add(0, token, expert(tokens[token]) * scores[token, number, None])
        return out.view(x.shape)


class ByOddNumbers(Block):
    """The experts' numbers are permuted by a table before rows are picked."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        moved = indices * 2 + 1
        for number, expert in enumerate(self.experts):
            token, slot = torch.where((moved - 1) * 0.5 == number)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class NoExperts(nn.Module):
    """One layer for the rows above a threshold."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        rows = torch.where(tokens[:, 0] > 0)[0]
        picked = tokens[rows]
        made = self.down(self.up(picked) * self.gate(picked).sigmoid())
        return tokens.index_add(0, rows, made).view(x.shape)
