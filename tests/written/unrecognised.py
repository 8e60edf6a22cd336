"""Code that dispatches rows to several experts in ways that no rule covers."""

from __future__ import annotations

import torch
from experts_idioms import Block
from torch import nn
from torch.nn import functional as F


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


class ByOrder(Block):
    """GShard's masks, in which a token's slot is its rank among all tokens, and no count."""

    def moe(self, x, weights, indices):
        chosen = F.one_hot(indices[:, 0], self.num_experts).float()
        place = (chosen * chosen.cos()).argsort(0).float()
        slot = (place * chosen).sum(-1).long() % 4
        mask = chosen[:, :, None] * F.one_hot(slot, 4)[:, None].float()
        rows = torch.einsum("sec,sm->ecm", mask, x)
        rows = torch.stack([expert(row) for expert, row in zip(self.experts, rows, strict=True)])
        return torch.einsum("sec,ecm->sm", mask * weights[:, 0, None, None], rows)


class Stacked(Block):
    """The weights of all experts, stacked."""

    def stacked(self):
        return (torch.stack([getattr(each, name).weight for each in self.experts]) for name in ("up", "down"))


class Mixing(Stacked):
    """Between its two matrices, the rows of a token's experts change places."""

    def moe(self, x, weights, indices):
        up, down = self.stacked()
        rows = torch.einsum("nd,nkfd->nkf", x, up[indices])
        rows = rows.flip(1)
        rows = torch.einsum("nkf,nkdf->nkd", rows, down[indices])
        return (rows * weights[..., None]).sum(1)


class AllAtAll(Block):
    """Every expert computes every token, the first one in another way, and the chosen results are picked."""

    def moe(self, x, weights, indices):
        first, *others = (expert(x) for expert in self.experts)
        rows = torch.stack([first.tanh(), *others], 1)
        places = indices.unsqueeze(-1).expand(-1, -1, x.shape[1])
        rows = rows.gather(1, places)
        return (rows * weights[..., None]).sum(1)


class NotZero(Stacked):
    """Every expert computes every token, and is not 0 where its weight is."""

    def moe(self, x, weights, indices):
        up, down = self.stacked()
        gates = torch.zeros(x.shape[0], self.num_experts).scatter(1, indices, weights)
        rows = torch.bmm(x.unsqueeze(0).expand(self.num_experts, -1, -1), up.transpose(1, 2))
        rows = torch.bmm(F.gelu(rows), down.transpose(1, 2))
        return torch.einsum("ne,end->nd", gates.exp(), rows)


class IntoGrid(Stacked):
    """Rows are written into a grid of so many places an expert."""

    def moe(self, x, weights, indices):
        up, down = self.stacked()
        chosen = indices.flatten()
        marks = F.one_hot(chosen, self.num_experts)
        place = (marks.cumsum(0) * marks).sum(-1) - 1
        rows, grid = x.repeat_interleave(self.k, 0), torch.zeros(self.num_experts, 20, x.shape[1])
        grid = grid.index_put([chosen, place], rows)
        grid = torch.bmm(F.gelu(torch.bmm(grid, up.transpose(1, 2))), down.transpose(1, 2))
        rows = grid[chosen, place] * weights.flatten()[:, None]
        return rows.view(-1, self.k, x.shape[1]).sum(1)


class IntoBuffer(Stacked):
    """Rows are added into a buffer of so many places an expert, and one for those that found none."""

    def moe(self, x, weights, indices):
        up, down = self.stacked()
        marks = F.one_hot(indices.flatten(), self.num_experts)
        place = (marks.cumsum(0) * marks).sum(-1) - 1
        to = torch.where(place < 8, indices.flatten() * 8 + place, self.num_experts * 8)
        buffer, width = x.new_zeros(self.num_experts * 8 + 1, x.shape[1]), x.shape[1]
        buffer.index_add_(0, to, x.repeat_interleave(self.k, 0))
        slots = buffer[:-1].view(self.num_experts, 8, width)
        slots = torch.bmm(F.gelu(torch.bmm(slots, up.transpose(1, 2))), down.transpose(1, 2))
        rows = torch.cat([slots.view(-1, width), x.new_zeros(1, width)])[to]
        return (rows.view(-1, self.k, width) * weights[..., None]).sum(1)


class ModulesOnBuffer(Block):
    """The same for one expert a token, with experts that are modules."""

    def moe(self, x, weights, indices):
        chosen, width = indices[:, 0], x.shape[1]
        marks = F.one_hot(chosen, self.num_experts)
        place = ((marks.cumsum(0) * marks).sum(-1) - 1).clamp(max=19)
        to = chosen * 20 + place
        buffer = x.new_zeros(self.num_experts * 20, width).index_add(0, to, x)
        slots = buffer.view(self.num_experts, 20, width).unbind(0)
        rows = torch.stack([expert(mine) for expert, mine in zip(self.experts, slots, strict=True)])
        return rows.view(-1, width)[to] * weights[:, :1]


class ExpertsChoose(Stacked):
    """Each expert chooses two tokens (arXiv:2202.09368)."""

    def forward(self, x):
        tokens, (up, down) = x.reshape(-1, x.shape[-1]), self.stacked()
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, 0)
        rows = torch.bmm(F.gelu(torch.bmm(tokens[chosen.t()], up.transpose(1, 2))), down.transpose(1, 2))
        rows = (rows * weights.t()[..., None]).reshape(-1, x.shape[-1])
        return torch.zeros_like(tokens).index_add(0, chosen.t().reshape(-1), rows).view(x.shape)


class ModulesChoose(Block):
    """The same in a loop over modules."""

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, 0)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token = chosen[:, number]
            out.index_add_(0, token, expert(tokens[token]) * weights[:, number, None])
        return out.view(x.shape)


class MasksOfChoosers(Stacked):
    """The same with the tokens that each expert chose as one-hot masks in einsums."""

    def forward(self, x):
        tokens, (up, down) = x.reshape(-1, x.shape[-1]), self.stacked()
        weights, chosen = self.gate(tokens).softmax(-1).t().topk(2, -1)
        marks = F.one_hot(chosen, tokens.shape[0]).to(x.dtype)
        rows = torch.einsum("ecn,nd->ecd", marks, tokens)
        rows = torch.bmm(F.gelu(torch.bmm(rows, up.transpose(1, 2))), down.transpose(1, 2))
        return torch.einsum("ecn,ec,ecd->nd", marks, weights, rows).view(x.shape)


class FirstRows(Block):
    """Each expert takes its first three tokens, and puts its rows in their place."""

    def moe(self, x, weights, indices):
        out = x.clone()
        for number, expert in enumerate(self.experts):
            token = torch.nonzero(indices[:, 0] == number)[:, 0][:3]
            out = out.index_put([token], expert(x[token]) * weights[token, 0, None])
        return out


class TwoBlocks(Block):
    """Two blocks, each left as it was written for a reason of its own."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.first, self.second = FirstRows(**sizes), AllAtAll(**sizes)

    def forward(self, x):
        return self.second(self.first(x) + x)


class Understood(Block):
    """Tokens in another order are tokens: nothing is said of what is understood."""

    def moe(self, x, weights, indices):
        order = torch.arange(x.shape[0]).flip(0)
        x, weights, indices = x[order], weights[order], indices[order]
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(indices == number)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out[order]


class Classifier(nn.Module):
    """The largest of several scores is no choice of experts."""

    def __init__(self):
        super().__init__()
        self.up, self.table, self.down = nn.Linear(16, 16), nn.Embedding(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.table(self.down(self.up(x).relu()).argmax(-1))
