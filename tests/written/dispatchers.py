"""MoE blocks that list their pairs: `nonzero` of a matrix of gates (N, E), then sorted by expert and split by counts.

The gates of some choices are exactly 0, so a token has between 0 and k experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Mlp(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Dispatched(nn.Module):
    """What all have in common; `dispatch` runs the experts on their rows."""

    def __init__(self, k: int = 2, experts: int = 6, d: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList([Mlp(d, 24) for _ in range(experts)])
        self.k, self.count = k, experts

    def gates(self, x):
        """(N, E): 0 for experts that were not chosen, and for chosen ones with a low score."""
        scores, indices = self.gate(x).topk(self.k, dim=-1)
        weights = F.relu(scores - 0.2)
        return torch.zeros(x.shape[0], self.count).scatter(1, indices, weights)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        return self.dispatch(tokens, self.gates(tokens)).view(x.shape)

    def dispatch(self, x, gates):
        raise NotImplementedError

    def reference(self, x):
        """Every expert at every token, in float64."""
        tokens = x.reshape(-1, x.shape[-1])
        gates = self.gates(tokens).double()
        out = torch.zeros_like(tokens, dtype=torch.float64)
        for number in range(self.count):
            up, down = self.experts[number].up, self.experts[number].down
            rows = F.gelu(tokens.double() @ up.weight.double().T + up.bias.double())
            rows = rows @ down.weight.double().T + down.bias.double()
            out += self.added(rows, gates[:, number : number + 1])
        return self.finished(out).view(x.shape)

    def added(self, rows, gates):
        return rows * gates

    def finished(self, out):
        return out


class SortedColumns(Dispatched):
    """Each column of the list is sorted by itself; the places of the experts' column are the order of the pairs."""

    def listed(self, gates):
        numbers, places = torch.nonzero(gates).sort(0)
        _, expert = numbers.split(1, dim=1)
        token = torch.nonzero(gates)[places[:, 1], 0]
        sizes = (gates > 0).sum(0).tolist()
        weights = torch.gather(gates[token.flatten()], 1, expert)
        return token, sizes, weights

    def dispatch(self, x, gates):
        token, sizes, weights = self.listed(gates)
        parts = torch.split(x[token].squeeze(1), sizes, dim=0)
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)], 0)
        zeros = torch.zeros(gates.size(0), rows.size(1), requires_grad=True)
        return zeros.index_add(0, token, rows.mul(weights).float())


class InLogSpace(SortedColumns):
    """Experts are added up as logarithms: exp before the sum, log after it."""

    def dispatch(self, x, gates):
        token, sizes, weights = self.listed(gates)
        parts = torch.split(x[token], sizes, dim=0)
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)], 0).exp()
        summed = torch.zeros(gates.size(0), rows.size(1)).index_add(0, token, rows * weights)
        summed[summed == 0] = 1e-9
        return summed.log()

    def added(self, rows, gates):
        return rows.exp() * gates

    def finished(self, out):
        return torch.where(out == 0, 1e-9, out).log()


class Unweighted(SortedColumns):
    """The gates only choose."""

    def dispatch(self, x, gates):
        token, sizes, _ = self.listed(gates)
        parts = x[token].split(sizes)
        rows = torch.cat([self.experts[e](parts[e]) for e in range(self.count)])
        return torch.zeros_like(x).index_add_(0, token, rows)

    def added(self, rows, gates):
        return rows * (gates != 0)


class FromBelow(SortedColumns):
    """Scores of experts that were not chosen are -inf, and 0 after a softmax."""

    def gates(self, x):
        scores, indices = self.gate(x).topk(self.k, dim=-1)
        return torch.full((x.shape[0], self.count), float("-inf")).scatter(1, indices, scores).softmax(-1)


class ExpertsFirst(Dispatched):
    """The transposed gates are listed, which are in the order of the experts already."""

    def dispatch(self, x, gates):
        expert, token = torch.nonzero(gates.t(), as_tuple=True)
        sizes = torch.count_nonzero(gates, dim=0).tolist()
        parts = x.index_select(0, token).split(sizes)
        rows = torch.cat([self.experts[e](parts[e]) for e in range(self.count)])
        return torch.zeros_like(x).index_add(0, token, rows * gates[token, expert].unsqueeze(-1))


class SortedTuple(Dispatched):
    """The list as a tuple, sorted by `argsort`, counted by `bincount`, and sliced between running bounds."""

    def dispatch(self, x, gates):
        token, expert = (gates > 0).nonzero(as_tuple=True)
        order = expert.argsort(stable=True)
        weights = gates[gates > 0][order]
        token, expert = token[order], expert[order]
        ends = torch.bincount(expert, minlength=self.count).cumsum(0).tolist()
        out, start = torch.zeros_like(x), 0
        for number, end in enumerate(ends):
            rows = self.experts[number](x[token[start:end]])
            out.index_add_(0, token[start:end], rows * weights[start:end, None])
            start = end
        return out


class Stacked(Dispatched):
    """No loop: each pair's weights are looked up, and pairs are in the order of the tokens."""

    def dispatch(self, x, gates):
        token, expert = gates.nonzero().unbind(1)
        up, down = (torch.stack([getattr(e, name).weight for e in self.experts]) for name in ("up", "down"))
        up_bias, down_bias = (
            torch.stack([getattr(e, name).bias for e in self.experts]) for name in ("up", "down")
        )
        rows = F.gelu(torch.bmm(up[expert], x[token].unsqueeze(-1)).squeeze(-1) + up_bias[expert])
        rows = torch.bmm(down[expert], rows.unsqueeze(-1)).squeeze(-1) + down_bias[expert]
        return torch.zeros_like(x).index_add(0, token, rows * gates[token, expert][:, None])


class NoChoice(SortedColumns):
    """Routing by ReLU: any number of experts a token."""

    def gates(self, x):
        return F.relu(self.gate(x))


class OneHotList(Dispatched):
    """Every chosen pair is listed: expert, slot, token, by a one-hot mask with the experts first."""

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, indices = self.gate(tokens).softmax(-1).topk(self.k, dim=-1)
        expert, slot, token = F.one_hot(indices, self.count).permute(2, 1, 0).nonzero(as_tuple=True)
        parts = tokens[token].split(torch.bincount(expert, minlength=self.count).tolist())
        rows = torch.cat([self.experts[e](parts[e]) for e in range(self.count)])
        return torch.zeros_like(tokens).index_add(0, token, rows * weights[token, slot, None]).view(x.shape)

    def gates(self, x):
        weights, indices = self.gate(x).softmax(-1).topk(self.k, dim=-1)
        return torch.zeros(x.shape[0], self.count).scatter(1, indices, weights)


class RoutingMap(Dispatched):
    """A map (N, E) of what was chosen, transposed: it picks the tokens' numbers and their weights, expert by expert."""

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, indices = self.gate(tokens).softmax(-1).topk(self.k, dim=-1)
        probs = torch.zeros(tokens.shape[0], self.count).scatter(1, indices, weights)
        chosen = torch.zeros(probs.shape, dtype=torch.int64).scatter(1, indices, 1).bool()
        by_expert = chosen.T.contiguous()
        token = torch.arange(tokens.shape[0]).unsqueeze(0).expand(self.count, -1).masked_select(by_expert)
        parts = tokens.index_select(0, token).split(chosen.sum(dim=0).tolist())
        rows = torch.cat([self.experts[e](parts[e]) for e in range(self.count)])
        rows = rows * probs.T.contiguous().masked_select(by_expert).unsqueeze(-1)
        places = token.unsqueeze(1).expand(-1, tokens.shape[1])
        return torch.zeros_like(tokens).scatter_add(0, places, rows).view(x.shape)

    def gates(self, x):
        weights, indices = self.gate(x).softmax(-1).topk(self.k, dim=-1)
        return torch.zeros(x.shape[0], self.count).scatter(1, indices, weights)


class TwoChoices(SortedColumns):
    """Two gates choose, perhaps the same expert, whose weights then are those of the second."""

    def __init__(self, k: int = 2) -> None:
        super().__init__(k)
        self.other = nn.Linear(16, self.count)

    def gates(self, x):
        indices = torch.stack([self.gate(x).argmax(-1), self.other(x).argmax(-1)], 1)
        weights = torch.stack([x[:, 0].sigmoid(), x[:, 1].sigmoid()], 1)
        return torch.zeros(x.shape[0], self.count).scatter(1, indices, weights)


class Signed(SortedColumns):
    """Gates may be negative, which are listed, and not counted."""

    def gates(self, x):
        scores, indices = self.gate(x).topk(self.k, dim=-1)
        return torch.zeros(x.shape[0], self.count).scatter(1, indices, scores + 9)


DISPATCHED = [
    SortedColumns, InLogSpace, Unweighted, FromBelow, ExpertsFirst, SortedTuple, Stacked, NoChoice, OneHotList,
    TwoChoices, RoutingMap,
]  # fmt: skip
