"""MoE blocks in the shapes that people write: the same experts and the same gate, the loop between them differs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Expert(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(d, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.down = nn.Linear(hidden, d)

    def forward(self, x):
        return self.down(F.gelu(self.norm(self.up(x))).clamp(-3, 3))


class Block(nn.Module):
    """The parts that all idioms share."""

    def __init__(self, d=16, experts=6, k=2):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList([Expert(d, 24) for _ in range(experts)])
        for norm in (expert.norm for expert in self.experts):
            nn.init.normal_(norm.weight)
        self.num_experts, self.k = experts, k

    def route(self, x):
        weights, indices = torch.topk(self.gate(x).softmax(-1), self.k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), indices

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, indices = self.route(tokens)
        return self.moe(tokens, weights, indices).view(x.shape)

    def reference(self, x):
        """Token by token, in float64."""
        twin = Block(x.shape[-1], self.num_experts, self.k).double()
        twin.load_state_dict(self.state_dict())
        tokens = x.reshape(-1, x.shape[-1])
        weights, indices = self.route(tokens)
        rows = []
        for token, its_weights, its_indices in zip(tokens, weights, indices, strict=True):
            pairs = zip(its_weights.reshape(-1), its_indices.reshape(-1).tolist(), strict=True)
            rows.append(sum(w.double() * twin.experts[e](token.double()[None])[0] for w, e in pairs))
        return torch.stack(rows).view(x.shape).float() if rows else x.clone()


class OverHits(Block):
    """transformers' loop over the experts that were hit."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        mask = F.one_hot(indices, num_classes=self.num_experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            slot, token = torch.where(mask[expert].squeeze(0))
            rows = self.experts[expert](x[None, token].reshape(-1, x.shape[-1])) * weights[token, slot, None]
            out.index_add_(0, token, rows.to(x.dtype))
        return out


class OverHitNumbers(Block):
    """The same by `.tolist()`, with the newer `expert[0]`."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        mask = F.one_hot(indices, num_classes=self.num_experts).permute(2, 1, 0)
        for expert in (mask.sum(dim=(-1, -2)) > 0).nonzero().flatten().tolist():
            slot, token = torch.where(mask[expert])
            out.index_add_(0, token, self.experts[expert](x[token]) * weights[token, slot].unsqueeze(-1))
        return out


class IfAny(Block):
    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            chosen = indices == expert
            mask = chosen.any(dim=-1)
            if mask.any():
                out[mask] += self.experts[expert](x[mask]) * (weights * chosen).sum(-1, keepdim=True)[mask]
        return out


class OverDistinct(Block):
    """Each number that was chosen, as a tensor; the slot is where the mask of a token has its first mark."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for element in torch.unique(indices.reshape(-1)):
            number = int(element.item())
            mask = indices == number
            token = mask.any(dim=-1).nonzero(as_tuple=False).squeeze(-1)
            if token.numel() == 0:
                continue
            slot = mask[token].int().argmax(dim=-1, keepdim=True)
            scale = weights.index_select(0, token).gather(-1, slot).squeeze(-1)
            out.index_add_(0, token, self.experts[number](x.index_select(0, token)) * scale.unsqueeze(-1))
        return out


class OverDistinctNumbers(Block):
    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for number in indices.unique().tolist():
            token, slot = torch.where(indices == number)
            out[token] += self.experts[number](x[token]) * weights[token, slot, None]
        return out


class WeightsByMask(Block):
    """The weights of an expert's rows are picked by the mask over the slots, in the order of the tokens."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = indices == number
            if mask.any():
                token = mask.any(dim=-1).nonzero().flatten()
                out.index_add_(0, token, expert(x[token]) * weights[mask].view(-1, 1))
        return out


class CountedDistinct(Block):
    """Each number that was chosen, beside how often it was."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        numbers, counts = torch.unique(indices, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if count == 0:
                continue
            token, slot = torch.where(indices == number)
            out[token] += self.experts[number](x[token]) * weights[token, slot, None]
        return out


class NotInIndices(Block):
    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if number not in indices:
                continue
            token, slot = torch.where(indices == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class SkipEmpty(Block):
    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(indices == expert)
            if token.numel() == 0:
                continue
            out[token] += self.experts[expert](x[token]) * weights[token, slot].unsqueeze(-1)
        return out


class SkipByCount(Block):
    def moe(self, x, weights, indices):
        out = x.new_zeros(x.shape)
        marks = F.one_hot(indices, self.num_experts)
        counts = marks.sum(dim=(0, 1))
        for number, expert in enumerate(self.experts):
            if counts[number] == 0:
                continue
            token, slot = torch.nonzero(marks[..., number], as_tuple=True)
            out.index_add_(0, token, weights[token, slot, None] * expert(x.index_select(0, token)))
        return out


class SkipByCountList(Block):
    """DeepSeek's reference implementation: counts as a Python list."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=self.num_experts).tolist()
        for number in range(self.num_experts):
            if counts[number] == 0:
                continue
            token, slot = torch.where(indices == number)
            out[token] += self.experts[number](x[token]) * weights[token, slot, None]
        return out


class OverMasks(Block):
    """lit-gpt's loop over the masks of all experts, written as a comparison with their numbers."""

    def moe(self, x, weights, indices):
        masks = (indices.unsqueeze(-1) == torch.arange(self.num_experts, device=x.device)).permute(2, 0, 1)
        out = torch.zeros_like(x)
        for mask, expert in zip(masks, self.experts, strict=True):
            token, slot = torch.where(mask)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out


class TopOne(Block):
    """Switch: one expert a token, rows are put, not added."""

    def __init__(self):
        super().__init__(k=1)

    def route(self, x):
        weights, indices = self.gate(x).softmax(-1).max(-1)
        return weights, indices

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (indices == number).nonzero().squeeze(-1)
            if len(rows) > 0:
                out[rows] = expert(x[rows]) * weights[rows, None]
        return out


class FusedWeights(Block):
    """One tensor for all experts' weights, as newer transformers have them; biases, and the input is weighted."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(self.num_experts, 16, 24) * 0.2)
        self.down = nn.Parameter(torch.randn(self.num_experts, 24, 16) * 0.2)
        self.bias = nn.Parameter(torch.randn(self.num_experts, 16))

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(indices == expert)
            rows = F.silu((x[token] * weights[token, slot, None]) @ self.up[expert])
            out = out.index_add(0, token, rows @ self.down[expert] + self.bias[expert])
        return out

    def reference(self, x):
        tokens = x.reshape(-1, x.shape[-1]).double()
        weights, indices = self.route(x.reshape(-1, x.shape[-1]))
        out = torch.zeros_like(tokens)
        for n in range(tokens.shape[0]):
            for w, e in zip(weights[n], indices[n].tolist(), strict=True):
                rows = F.silu((tokens[n] * w.double()) @ self.up[e].double())
                out[n] += rows @ self.down[e].double() + self.bias[e].double()
        return out.view(x.shape).float()


class AddedToInput(Block):
    """The block adds to its input, not to zeros."""

    def moe(self, x, weights, indices):
        out = x.clone()
        for expert in range(self.num_experts):
            token, slot = torch.where(indices == expert)
            out = out.index_add(0, token, self.experts[expert](x[token]) * weights[token, slot, None])
        return out

    def reference(self, x):
        return x + super().reference(x)


class Gates(Block):
    """Weights are a matrix of gates, 0 for the experts that a token did not choose."""

    def gates(self, weights, indices):
        return weights.new_zeros(*indices.shape[:-1], self.num_experts).scatter(-1, indices, weights)


class OverGates(Gates):
    """An expert takes the tokens whose gate is above 0."""

    def moe(self, x, weights, indices):
        gates, out = self.gates(weights, indices), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token = (gates[:, number] > 0).nonzero().view(-1)
            out.index_add_(0, token, expert(x[token]) * gates[token, number].unsqueeze(-1))
        return out


class FlatMasks(Gates):
    """Tokens keep their axes; flattened masks pick the rows, and the others say where they belong."""

    def forward(self, x):
        weights, indices = self.route(x)
        rows, out = x.view(-1, x.shape[-1]), torch.zeros_like(x)
        gates = self.gates(weights, indices).view(-1, self.num_experts)
        for number, expert in enumerate(self.experts):
            mask = (indices == number).any(-1)
            flat = mask.view(-1)
            if flat.any():
                out[mask] += expert(rows[flat]) * gates[flat, number].unsqueeze(1)
        return out


class WholeSlices(Block):
    """`mask[:, :, e]`, turned, with slices that take everything."""

    def moe(self, x, weights, indices):
        mask, out = F.one_hot(indices, self.num_experts), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            slot, token = torch.where(mask[:, :, number].t() > 0)
            out.index_add_(0, token, expert(x[token, :]) * weights[token, slot][:, None])
        return out


class ListedRows(Block):
    """Rows as Python lists, as transformers' first loop over experts took them."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        mask = F.one_hot(indices, num_classes=self.num_experts).permute(2, 1, 0)
        for expert in range(self.num_experts):
            slot, token = torch.where(mask[expert])
            if token.shape[0] == 0:
                continue
            token_list, slot_list = token.tolist(), slot.tolist()
            rows = self.experts[expert](x[None, token_list].reshape(-1, x.shape[-1]))
            out.index_add_(0, token, rows * weights[token_list, slot_list, None])
        return out


class ListsAreCopies(Block):
    """A list, and a tensor made of it, stay what they were when what they were made of is written to."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(indices == expert)
            tokens, slots = token.tolist(), slot.tolist()
            token *= 0
            torch.tensor(slots).add_(7)
            if len(tokens) > 0:
                rows = self.experts[expert](x[tokens]) * weights[tokens, slots, None]
                out.index_add_(0, torch.tensor(tokens), rows)
        return out


class ArraysOfRows(Block):
    """Rows as NumPy's arrays and lists, read, written, and made a tensor again."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = (indices == expert).nonzero(as_tuple=True)
            tokens, slots = token.cpu().numpy(), slot.tolist()
            if not slots:
                continue
            rows = self.experts[expert](x[torch.as_tensor(tokens)])
            out[tokens] += rows * weights[tokens, slots].unsqueeze(-1)
        return out


IDIOMS = [
    ListedRows,
    ListsAreCopies,
    ArraysOfRows,
    OverHits, OverHitNumbers, OverDistinct, OverDistinctNumbers, CountedDistinct, NotInIndices, IfAny, SkipEmpty,
    SkipByCount, SkipByCountList,
    OverMasks, WeightsByMask, TopOne, FusedWeights, AddedToInput, OverGates, FlatMasks, WholeSlices,
]  # fmt: skip
