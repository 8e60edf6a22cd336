"""MoE blocks in which all experts compute all tokens, and the results of the chosen ones are picked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from experts_idioms import Block
from lined_up import AllExpertsWeightedOut


class Gathered(Block):
    """Results stacked behind the tokens, and gathered."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], dim=1)
        picked = outs.gather(1, indices.unsqueeze(-1).expand(-1, -1, outs.shape[-1]))
        return (picked * weights.unsqueeze(-1)).sum(dim=1)


class GatheredFromBehind(Block):
    """The same with axes counted from behind, numbers that are repeated, and an einsum for the sum."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        picked = torch.gather(outs, -2, indices[:, :, None].repeat(1, 1, x.shape[-1]))
        return torch.einsum("nk,nkh->nh", weights, picked)


class TakenAlong(Block):
    """`take_along_dim`, which spreads the numbers by itself."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        return (torch.take_along_dim(outs, indices[..., None], 1) * weights[..., None]).sum(1)


class Indexed(Block):
    """Numbers of tokens beside those of experts."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        picked = outs[torch.arange(x.shape[0])[:, None], indices]
        return (weights.unsqueeze(1) @ picked).squeeze(1)


class ExpertsInFront(Block):
    """Results stacked in front of the tokens, and picked for all pairs one after the other."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts])
        token = torch.arange(x.shape[0]).repeat_interleave(self.k)
        rows = outs[indices.flatten(), token] * weights.flatten()[:, None]
        return rows.view(-1, self.k, x.shape[-1]).sum(1)


class ByOneHot(Block):
    """A product with the one-hot mask of the choice."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        picked = F.one_hot(indices, self.num_experts).to(x.dtype) @ outs
        return (picked * weights[..., None]).sum(1)


class InOneEinsum(Block):
    """Mask, weights and results in one einsum."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        return torch.einsum("nke,nk,neh->nh", F.one_hot(indices, self.num_experts).float(), weights, outs)


class FirstChoice(Block):
    """One expert a token, picked by integers."""

    def __init__(self, **sizes):
        super().__init__(**{**sizes, "k": 1})

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        return outs[torch.arange(x.shape[0]), indices.squeeze(-1)] * weights


class SlotBySlot(Block):
    """The pairs of one slot after the other, added to the input."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        out = torch.zeros_like(x)
        for slot in range(self.k):
            out += weights[:, slot : slot + 1] * outs[torch.arange(x.shape[0]), indices[:, slot]]
        return out


class OfStackedWeights(AllExpertsWeightedOut):
    """Einsums of all experts' stacked weights."""

    def moe(self, x, weights, indices):
        hidden = F.silu(torch.einsum("nd,edf->nef", x, self.up))
        outs = torch.einsum("nef,efd->ned", hidden, self.down) + self.bias
        picked = outs.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))
        return (picked * weights[..., None]).sum(1)


class KeepsAxes(Block):
    """Batch and time stay axes of their own."""

    def forward(self, x):
        weights, indices = self.route(x)
        outs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        picked = outs.gather(-2, indices.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
        return (picked * weights.unsqueeze(-1)).sum(-2)


class GatesOfAxes(Block):
    """The same with gates that are 0 for experts that were not chosen."""

    def forward(self, x):
        weights, indices = self.route(x)
        gates = torch.zeros_like(self.gate(x)).scatter(-1, indices, weights)
        outs = torch.stack([expert(x) for expert in self.experts], dim=2)
        return (outs * gates.unsqueeze(-1)).sum(2)


PICKED = [
    Gathered, GatheredFromBehind, TakenAlong, Indexed, ExpertsInFront, ByOneHot, InOneEinsum, FirstChoice, SlotBySlot,
    OfStackedWeights, KeepsAxes, GatesOfAxes,
]  # fmt: skip


class Unlike(Block):
    """One expert computes in another way."""

    def moe(self, x, weights, indices):
        first, *others = (expert(x) for expert in self.experts)
        outs = torch.stack([first.tanh(), *others], 1)
        picked = outs.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))
        return (picked * weights[..., None]).sum(1)


class Mixed(Block):
    """What an expert gives depends on the others."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1).softmax(1)
        picked = outs.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))
        return (picked * weights[..., None]).sum(1)


class OfTokens(Block):
    """The numbers of experts pick tokens."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        picked = outs.gather(0, indices[..., None].expand(-1, -1, x.shape[-1]))
        return (picked * weights[..., None]).sum(1)


class OfOthers(Block):
    """Each token gets what the experts gave the one opposite."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        picked = outs[torch.arange(x.shape[0]).flip(0)[:, None], indices]
        return (picked * weights[..., None]).sum(1)


class Shared(Block):
    """The choice of the first token is that of all."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        return (outs[:, indices[0]] * weights[..., None]).sum(1)


class ByFeature(Block):
    """Each number of a row is that of another expert."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        numbers = (indices[..., None] + torch.arange(x.shape[-1])) % self.num_experts
        return (outs.gather(1, numbers) * weights[..., None]).sum(1)


class SlotsUnlike(Block):
    """Each slot has the weight of the other."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        out = torch.zeros_like(x)
        for slot in range(self.k):
            out += weights[:, 1 - slot, None] * outs[torch.arange(x.shape[0]), indices[:, slot]]
        return out


class OneSlotTwice(Block):
    """The first slot counts twice."""

    def moe(self, x, weights, indices):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        out = x
        for slot in range(self.k):
            out = out + weights[:, slot, None] * outs[torch.arange(x.shape[0]), indices[:, 0]]
        return out


NOT_PICKED = [Unlike, Mixed, OfTokens, OfOthers, Shared, ByFeature]
SLOTS_APART = [SlotsUnlike, OneSlotTwice]
