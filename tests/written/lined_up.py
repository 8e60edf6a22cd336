"""MoE blocks in the shapes of code that lines up all token-expert pairs at once, or sorts them by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from experts_idioms import Block, FusedWeights
from torch import nn


class MoeInfer(Block):
    """DeepSeek's inference: pairs sorted by expert, counts as a NumPy array, slices between running bounds."""

    @torch.no_grad()
    def moe(self, x, weights, indices):
        marks = indices.new_zeros((indices.shape[0], self.num_experts))
        marks.scatter_(1, indices, 1)
        counts = marks.sum(dim=0)
        order = indices.view(-1).argsort()
        rows = x[order // indices.shape[1]]
        counts = counts.cpu().numpy()
        outputs, start = [], 0
        for number, count in enumerate(counts):
            end = start + count
            if count == 0:
                continue
            outputs.append(self.experts[number](rows[start:end]))
            start = end
        together = torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)
        back = torch.empty_like(together)
        back[order] = together
        pairs = back.view(*indices.shape, -1).type(weights.dtype)
        return pairs.mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(back.dtype)


class RunningBounds(Block):
    """The same with `bincount().cumsum()`, each expert's rows added to those of their tokens by `scatter_reduce_`."""

    def moe(self, x, weights, indices):
        flat, flat_weights = indices.view(-1), weights.view(-1, 1)
        out = torch.zeros_like(x)
        order = flat.argsort()
        ends = flat.bincount().cpu().numpy().cumsum(0)
        tokens = order // self.k
        for number, end in enumerate(ends):
            start = 0 if number == 0 else ends[number - 1]
            if start == end:
                continue
            mine = tokens[start:end]
            rows = self.experts[number](x[mine])
            rows.mul_(flat_weights[order[start:end]])
            out.scatter_reduce_(0, mine.view(-1, 1).repeat(1, x.shape[-1]), rows, reduce="sum")
        return out


class WrittenInPlace(Block):
    """Each expert's rows are written to where they were: `out[start:end] = expert(rows[start:end])`."""

    def moe(self, x, weights, indices):
        flat = indices.reshape(-1)
        order = torch.argsort(flat)
        tokens = torch.arange(x.shape[0]).repeat_interleave(self.k)[order]
        counts = torch.bincount(flat, minlength=self.num_experts)
        ends = torch.cumsum(counts, dim=0).tolist()
        rows = x[tokens]
        found = torch.empty_like(rows)
        start = 0
        for number, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            end = ends[number]
            found[start:end] = self.experts[number](rows[start:end])
            start = end
        found = found * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, tokens, found)


class SplitByCounts(Block):
    """The sorted rows are split by a list of counts, and what comes back is added by `index_add`."""

    def moe(self, x, weights, indices):
        chosen = x.new_zeros((x.shape[0], self.num_experts)).scatter(1, indices, 1)
        sizes = chosen.long().sum(0).tolist()
        _, order = indices.flatten().sort(0)
        tokens = order.div(self.k, rounding_mode="trunc")
        parts = x[tokens].split(sizes, dim=0)
        rows = torch.cat([self.experts[e](parts[e]) for e in range(self.num_experts)], dim=0)
        rows = rows * weights.flatten()[order][:, None]
        return torch.zeros((x.shape[0], x.shape[1]), dtype=rows.dtype).index_add(0, tokens, rows)


class WrittenByParts(Block):
    """A buffer is split as the sorted rows are, and products write into its parts; biases are added afterwards."""

    def moe(self, x, weights, indices):
        flat = indices.flatten()
        order, counts = flat.argsort(), torch.bincount(flat, minlength=self.num_experts).tolist()
        rows = x[order // self.k]
        hidden, found = torch.empty(rows.shape[0], 24), torch.empty_like(rows)
        between, after = hidden.split(counts), found.split(counts)
        for part, expert, into in zip(rows.split(counts), self.experts, between, strict=True):
            torch.mm(part, expert.up.weight.t(), out=into)
            into.add_(expert.up.bias)
        for part, expert, into in zip(between, self.experts, after, strict=True):
            torch.mm(F.gelu(expert.norm(part)).clamp_(-3, 3), expert.down.weight.t(), out=into)
        for number, expert in enumerate(self.experts):
            after[number].add_(expert.down.bias)
        return torch.zeros_like(x).index_add(0, order // self.k, found * weights.flatten()[order, None])


class FlatLoop(Block):
    """Every token repeated k times; a loop over the experts writes the rows of a flat mask."""

    def moe(self, x, weights, indices):
        repeated, flat = x.repeat_interleave(self.k, dim=0), indices.view(-1)
        out = torch.empty_like(repeated)
        for number, expert in enumerate(self.experts):
            out[flat == number] = expert(repeated[flat == number])
        return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


class GroupedMatmul(FusedWeights):
    """Stacked weights and `grouped_mm` of rows that are sorted by expert."""

    def moe(self, x, weights, indices):
        flat = indices.flatten()
        order = torch.argsort(flat, stable=True)
        rows = x[order // self.k] * weights.flatten()[order, None]
        ends = torch.cumsum(torch.bincount(flat, minlength=self.num_experts), 0).to(torch.int32)
        hidden = F.silu(F.grouped_mm(rows, self.up, offs=ends))
        rows = F.grouped_mm(hidden, self.down, offs=ends) + self.bias[flat[order]]
        return torch.zeros_like(x).index_add(0, order // self.k, rows)


class UnsortedBack(FusedWeights):
    """`torch._grouped_mm`, and the inverse permutation by an argsort of the order."""

    def moe(self, x, weights, indices):
        flat = indices.reshape(-1)
        chosen, order = flat.sort(stable=True)
        ends = F.one_hot(flat, self.num_experts).sum(0).cumsum(0, dtype=torch.int32)
        rows = (x * 1.0)[order // self.k] * weights.reshape(-1)[order].unsqueeze(-1)
        hidden = F.silu(torch._grouped_mm(rows, self.up, ends))
        rows = torch._grouped_mm(hidden, self.down, ends) + self.bias[chosen]
        return rows[order.argsort()].view(*indices.shape, -1).sum(1)


class GatheredWeights(FusedWeights):
    """The weights of each pair are looked up, then `bmm`; the slots are added by another `bmm`."""

    def moe(self, x, weights, indices):
        flat = indices.flatten()
        rows = (x.unsqueeze(1).expand(-1, self.k, -1) * weights.unsqueeze(-1)).reshape(-1, 1, x.shape[-1])
        hidden = F.silu(torch.bmm(rows, self.up[flat]))
        rows = torch.bmm(hidden, self.down[flat]).squeeze(1) + self.bias[flat]
        return torch.bmm(torch.ones_like(weights).unsqueeze(1), rows.view(*indices.shape, -1)).squeeze(1)


class Einsums(FusedWeights):
    """The weights of each token's slots are looked up, and every product is an einsum."""

    def moe(self, x, weights, indices):
        hidden = F.silu(torch.einsum("nkh,nkhf->nkf", x[:, None] * weights[..., None], self.up[indices]))
        return (torch.einsum("nkf,nkfh->nkh", hidden, self.down[indices]) + self.bias[indices]).sum(1)


class EinsumsOfLastAxes(FusedWeights):
    """The same products, that name the last axes only."""

    def moe(self, x, weights, indices):
        hidden = F.silu(torch.einsum("...h,...hf->...f", x[:, None] * weights[..., None], self.up[indices]))
        return (torch.einsum("...f,...fh->...h", hidden, self.down[indices]) + self.bias[indices]).sum(1)


class AllExperts(FusedWeights):
    """Llama 4: every expert computes every token; what was not chosen is multiplied by sigmoid(-inf)."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(self.num_experts, 16))

    def route(self, x):
        scores, indices = torch.topk(self.gate(x), self.k, dim=-1)
        return scores.sigmoid(), indices

    def moe(self, x, weights, indices):
        scores = torch.full((x.shape[0], self.num_experts), float("-inf")).scatter(
            1, indices, weights.logit()
        )
        rows = x.repeat(self.num_experts, 1) * scores.sigmoid().transpose(0, 1).reshape(-1, 1)
        rows = rows.view(self.num_experts, -1, x.shape[-1])
        return torch.bmm(F.silu(torch.bmm(rows, self.up)), self.down).sum(dim=0)


class AllExpertsWeightedOut(FusedWeights):
    """Every expert computes every token, with biases; the results are weighted."""

    def moe(self, x, weights, indices):
        scores = torch.zeros((x.shape[0], self.num_experts)).scatter(1, indices, weights)
        rows = x.unsqueeze(0).expand(self.num_experts, -1, -1)
        rows = torch.bmm(F.silu(torch.bmm(rows, self.up)), self.down) + self.bias[:, None]
        return (rows * scores.t().unsqueeze(-1)).sum(0)

    def reference(self, x):
        tokens = x.reshape(-1, x.shape[-1]).double()
        weights, indices = self.route(x.reshape(-1, x.shape[-1]))
        out = torch.zeros_like(tokens)
        for n in range(tokens.shape[0]):
            for w, e in zip(weights[n], indices[n].tolist(), strict=True):
                rows = F.silu(tokens[n] @ self.up[e].double()) @ self.down[e].double()
                out[n] += w.double() * (rows + self.bias[e].double())
        return out.view(x.shape).float()


class SlotBySlot(AllExpertsWeightedOut):
    """Weights are looked up for the pairs of one slot after the other, and their rows are added up."""

    def moe(self, x, weights, indices):
        out = None
        for slot in range(self.k):
            expert = indices[:, slot]
            hidden = F.silu(torch.einsum("nd,ndf->nf", x, self.up[expert]))
            rows = torch.bmm(hidden.unsqueeze(1), self.down[expert]).squeeze(1) + self.bias[expert]
            rows = rows * weights[:, slot].unsqueeze(-1)
            out = rows if out is None else out + rows
        return out


class NotDropped(FusedWeights):
    """The input is weighted and a bias follows: an expert that was not chosen still adds its bias."""

    def moe(self, x, weights, indices):
        scores = torch.zeros((x.shape[0], self.num_experts)).scatter(1, indices, weights)
        rows = x.unsqueeze(0).expand(self.num_experts, -1, -1) * scores.t().unsqueeze(-1)
        return (torch.bmm(F.silu(torch.bmm(rows, self.up)), self.down) + self.bias[:, None]).sum(0)


class Capacity(Block):
    """Switch Transformers: a token that finds its expert full is masked out, sequence by sequence."""

    def __init__(self):
        super().__init__(k=1)

    def forward(self, x):
        probabilities = self.gate(x).softmax(-1)  # (batch, length, experts)
        chosen = F.one_hot(probabilities.argmax(-1), self.num_experts)
        chosen = chosen * (chosen.cumsum(-2) <= 3)
        weights = probabilities.max(-1).values.view(-1, 1)
        marks = chosen.view(-1, 1, self.num_experts).permute(2, 1, 0)
        rows = x.view(-1, x.shape[-1])
        out = torch.zeros_like(rows)
        for expert in torch.greater(marks.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(marks[expert].squeeze(0))
            mine = rows[None, token].reshape(-1, rows.shape[-1])
            out.index_add_(0, token, self.experts[expert[0]](mine) * weights[token, slot, None])
        return out.view(x.shape)


LINED_UP = [
    MoeInfer, RunningBounds, WrittenInPlace, SplitByCounts, WrittenByParts, FlatLoop, GroupedMatmul, UnsortedBack,
    GatheredWeights, Einsums, EinsumsOfLastAxes, AllExperts, AllExpertsWeightedOut, SlotBySlot,
]  # fmt: skip
