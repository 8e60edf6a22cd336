"""MoE blocks that hand tokens to experts through masks with a capacity, in the shapes that people write.

Letters: s tokens, e experts, c slots of an expert, m features, k choices, g groups (sequences).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Masked(nn.Module):
    """What all have in common: a router, and experts as modules or as stacked weights."""

    def __init__(self, d=16, experts=4, hidden=24):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d)) for _ in range(experts)
        )
        self.up = nn.Parameter(torch.randn(experts, d, hidden) * 0.2)
        self.bias = nn.Parameter(torch.randn(experts, 1, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, d) * 0.2)
        self.num_experts = experts

    def capacity(self, tokens, factor=1.0, least=2):
        return max(math.ceil(tokens / self.num_experts * factor), least)

    def each(self, slots):
        """(e, c, m), a module an expert."""
        return torch.cat([expert(part) for expert, part in zip(self.experts, slots.chunk(4), strict=True)])

    def stacked(self, slots):
        """(e, c, m), all experts at once."""
        return torch.bmm(F.silu(torch.baddbmm(self.bias, slots, self.up)), self.down)

    def forward(self, x):
        return self.moe(x.reshape(-1, x.shape[-1])).view(x.shape)


class FirstChoice(Masked):
    """DeepSpeed's top-1: `one_hot` of the slots with a capacity that follows the tokens, and two einsums."""

    def moe(self, x):
        gates = self.router(x).softmax(1)
        slots = math.ceil(x.shape[0] / self.num_experts * 1.25)
        mask = F.one_hot(gates.argmax(1), num_classes=self.num_experts)
        places = torch.cumsum(mask, dim=0) - 1
        mask = mask * torch.lt(places, slots)
        place = F.one_hot((places * mask).sum(1), num_classes=slots).float()
        combine = torch.einsum("se,sc->sec", gates * mask.float(), place)
        given = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        return torch.einsum("sec,ecm->sm", combine.type_as(x), self.each(given))


class TwoChoices(Masked):
    """DeepSpeed's top-2 with its products spelled out, on one rank of experts: an axis of size 1 in front."""

    def moe(self, x):
        gates = self.router(x).softmax(1)
        slots = self.capacity(x.shape[0], 2.0)
        first = F.one_hot(gates.argmax(1), num_classes=self.num_experts)
        rest = self.router(x).masked_fill(first.bool(), float("-inf"))
        second = F.one_hot(rest.argmax(1), num_classes=self.num_experts)
        places1 = torch.cumsum(first, dim=0) - 1
        places2 = torch.cumsum(second, dim=0) - 1
        places2 += torch.sum(first, dim=0, keepdim=True)
        first = first * torch.lt(places1, slots)
        second = second * torch.lt(places2, slots)
        place1, place2 = (places1 * first).sum(1), (places2 * second).sum(1)
        weight1 = torch.bmm(gates.unsqueeze(1), first.float().unsqueeze(2)).reshape(-1)
        weight2 = torch.bmm(gates.unsqueeze(1), second.float().unsqueeze(2)).reshape(-1)
        total = (weight1 + weight2).clamp(min=torch.finfo(gates.dtype).eps)
        weights1 = (weight1 / total).reshape(-1, 1) * first.float()
        weights2 = (weight2 / total).reshape(-1, 1) * second.float()
        combine = weights1.unsqueeze(2) * F.one_hot(place1, slots).float().unsqueeze(1)
        combine = combine + weights2.unsqueeze(2) * F.one_hot(place2, slots).float().unsqueeze(1)
        mask = combine.bool().to(x.dtype)
        given = torch.matmul(mask.reshape(x.shape[0], -1).t(), x)
        given = given.reshape(1, self.num_experts, -1, x.shape[1])
        outputs = [expert(part) for expert, part in zip(self.experts, given.chunk(4, dim=1), strict=True)]
        made = torch.cat(outputs, dim=1).reshape(self.num_experts, -1, x.shape[1])
        return torch.matmul(combine.reshape(x.shape[0], -1), made.reshape(-1, x.shape[1]))


class SeveralHot(Masked):
    """DeepSpeed's top-k: a mask with k marks a token, whose running count gives the slots of all choices."""

    def moe(self, x):
        gates = self.router(x).softmax(1)
        slots = self.capacity(x.shape[0], 3.0)
        _, chosen = torch.topk(gates, k=3, dim=1)
        mask = torch.zeros_like(gates).scatter_(1, chosen, 1)
        places = torch.cumsum(mask, dim=0) - 1
        mask *= torch.lt(places, slots)
        kept = gates * mask
        kept = kept / kept.sum(1, keepdim=True).clamp(min=1e-9)
        place = F.one_hot((places * mask).long(), num_classes=slots).float()
        combine = torch.einsum("se,sec->sec", kept, place)
        given = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        return torch.einsum("sec,ecm->sm", combine, self.stacked(given))


class OuterProducts(Masked):
    """fairseq: outer products by `bmm`, slots marked by `scatter_`, dispatch and combine as flat products."""

    def moe(self, x):
        gates = self.router(x).softmax(1)
        slots = 2 * math.ceil(x.shape[0] / self.num_experts)
        index1 = gates.argmax(1, keepdim=True)
        first = torch.zeros(x.shape[0], 4, dtype=torch.int64).scatter_(1, index1, 1)
        index2 = self.router(x).masked_fill(first.bool(), float("-inf")).argmax(1)
        second = torch.zeros(x.shape[0], 4, dtype=torch.int64).scatter_(1, index2.unsqueeze(-1), 1)
        weight1, weight2 = (gates * first).sum(1), (gates * second).sum(1)
        places1, places2 = first.cumsum(0) - 1, second.cumsum(0) - 1
        places2 = places2 + first.sum(0, keepdim=True)
        first, second = first * (places1 < slots), second * (places2 < slots)
        place1, place2 = (places1 * first).sum(1), (places2 * second).sum(1)
        weights1, weights2 = weight1.unsqueeze(-1) * first, weight2.unsqueeze(-1) * second
        marks1 = torch.zeros(x.shape[0], slots).scatter_(1, place1.unsqueeze(-1), 1)
        marks2 = torch.zeros(x.shape[0], slots).scatter_(1, place2.unsqueeze(-1), 1)
        combine = torch.bmm(weights1.unsqueeze(-1), marks1.unsqueeze(1))
        combine = combine + torch.bmm(weights2.unsqueeze(-1), marks2.unsqueeze(1))
        mask = combine.bool().permute(1, 2, 0)  # (e, c, s)
        count, size = 4 * slots, x.shape[0]
        given = torch.mm(mask.reshape(count, size).to(x.dtype), x).reshape(4, slots, -1)
        made = torch.stack([expert(given[e]) for e, expert in enumerate(self.experts)])
        return combine.reshape(size, count).mm(made.reshape(count, -1))


class LoopOfChoices(Masked):
    """Tutel's order: each further choice counts on from the totals of those before."""

    def moe(self, x):
        gates = self.router(x).softmax(-1)
        slots = self.capacity(x.shape[0], 1.5)
        chosen = gates.topk(3, dim=-1).indices
        combine, before = 0, 0
        for number in range(3):
            mask = F.one_hot(chosen[:, number], self.num_experts)
            places = mask.cumsum(0) - 1 + before
            before = before + mask.sum(0, keepdim=True)
            place = (places * mask).sum(1)
            kept = (gates * mask).sum(1) * (place < slots)
            at = (place.unsqueeze(-1) == torch.arange(slots)).to(x.dtype)
            combine = combine + kept[:, None, None] * mask[:, :, None] * at[:, None, :]
        given = torch.einsum("sec,sm->ecm", (combine != 0).to(x.dtype), x)
        return torch.einsum("ecm,sec->sm", self.stacked(given), combine)


class Groups(Masked):
    """Switch in einsum form: every sequence has its own slots, counted from 1, and a mask of its own to dispatch."""

    def forward(self, x):
        slots = self.capacity(x.shape[1])
        probabilities = self.router(x).softmax(-1)  # (g, s, e)
        weight, index = probabilities.max(-1)
        mask = F.one_hot(index, self.num_experts).to(x.dtype)
        place = mask.cumsum(1) * mask
        mask = mask * (place <= slots).to(x.dtype)
        number = ((place - 1) * mask).sum(-1).long()
        dispatch = mask.unsqueeze(-1) * F.one_hot(number, slots).unsqueeze(2).to(x.dtype)
        combine = weight[:, :, None, None] * dispatch
        given = torch.einsum("gsec,gsm->egcm", dispatch, x)
        parts = [expert(part) for expert, part in zip(self.experts, given.unbind(0), strict=True)]
        return torch.einsum("gsec,egcm->gsm", combine, torch.stack(parts))


class FloatMasks(Masked):
    """Masks in floats, per sequence; running counts without the token itself; a threshold for the second choice."""

    def before(self, mask):
        return F.pad(mask, (0, 0, 1, 0)).cumsum(-2)[..., :-1, :]

    def first(self, gates):
        return gates.max(-1)

    def at(self, place, slots):
        return (place.unsqueeze(-1) == torch.arange(slots)).float()

    def forward(self, x):
        slots = self.capacity(x.shape[1], 1.25)
        gates = self.router(x).softmax(-1)
        gate1, index1 = self.first(gates)
        mask1 = F.one_hot(index1, self.num_experts).float()
        gate2, index2 = self.first(gates * (1 - mask1))
        mask2 = F.one_hot(index2, self.num_experts).float()
        total = gate1 + gate2 + 1e-9
        gate1, gate2 = gate1 / total, gate2 / total
        mask2 = mask2 * (gate2 > 0.2).unsqueeze(-1).float()
        place1 = self.before(mask1) * mask1
        mask1 = mask1 * (place1 < float(slots)).float()
        used, flat1 = mask1.sum(-2, keepdim=True), mask1.sum(-1)
        place1 = place1.sum(-1)
        gate1 = gate1 * flat1
        place2 = (self.before(mask2) + used) * mask2
        mask2 = mask2 * (place2 < float(slots)).float()
        flat2 = mask2.sum(-1)
        place2 = place2.sum(-1)
        gate2 = gate2 * flat2

        def placed(gate, flat, index, place):
            at = self.at(place.long(), slots)
            marks = F.one_hot(index, self.num_experts)[..., None]
            return gate[..., None, None] * flat[..., None, None] * marks * at[..., None, :]

        combine = placed(gate1, flat1, index1, place1) + placed(gate2, flat2, index2, place2)
        dispatch = combine.bool().to(combine)
        given = torch.einsum("bnd,bnec->ebcd", x, dispatch)
        shape = given.shape
        given = given.reshape(shape[0], -1, shape[-1])
        made = torch.einsum("...nd,...dh->...nh", given, self.up).relu()
        made = torch.einsum("...nh,...hd->...nd", made, self.down)
        return torch.einsum("ebcd,bnec->bnd", made.reshape(shape), combine)


class RoomyOneHot(FloatMasks):
    """The slots' one-hot masks have room for those of tokens without a slot, which are cut off."""

    def first(self, gates):
        return (each.squeeze(-1) for each in gates.topk(1, dim=-1))

    def at(self, place, slots):
        return F.one_hot(place, max(place.max() + 1, slots))[..., :slots]


class ChoicesFirst(Masked):
    """T5X: all first choices before the second ones, by a running count over choices and tokens together."""

    def moe(self, x):
        probabilities = self.router(x).softmax(-1)
        slots = self.capacity(x.shape[0], 2.0)
        _, chosen = torch.topk(probabilities, 2)
        marks = F.one_hot(chosen.t(), self.num_experts)  # (k, s, e)
        flat = marks.reshape(-1, self.num_experts)
        rank = (flat.cumsum(0) - 1).reshape(2, -1, self.num_experts)
        marks = marks * (rank < slots)
        place = (rank * marks).sum(-1)  # (k, s)
        at = F.one_hot(place, slots)
        weights = marks * probabilities[None]
        combine = (weights.unsqueeze(3) * at.unsqueeze(2)).sum(0)
        given = combine.bool().permute(1, 2, 0).type_as(x) @ x
        made = self.stacked(given)
        return combine.view(x.shape[0], -1) @ made.view(-1, x.shape[1])


class PlacesOfEach(Masked):
    """A slot a choice and expert: -1 and what is too large stand for none; the choices are summed by an einsum."""

    def moe(self, x):
        probabilities = self.router(x).softmax(-1)
        slots = self.capacity(x.shape[0], 1.25)
        weights, chosen = torch.topk(probabilities, 2)
        marks = F.one_hot(chosen, self.num_experts)  # (s, k, e)
        flat = marks.transpose(0, 1).reshape(-1, self.num_experts)
        place = (flat.cumsum(0) * flat - 1).reshape(2, -1, self.num_experts).transpose(0, 1)
        at = (place.unsqueeze(-1) == torch.arange(slots)).to(x.dtype) * marks.unsqueeze(-1)
        combine = torch.einsum("sk,skec->sec", weights, at)
        given = torch.einsum("sec,sm->ecm", (combine > 0).to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", combine, self.stacked(given))


class FixedCapacity(Masked):
    """Four slots an expert, whatever the number of tokens; the router weights what goes into the experts."""

    def moe(self, x):
        gates = self.router(x).sigmoid()
        mask = F.one_hot(gates.argmax(-1), self.num_experts).to(x.dtype)
        place = ((mask.cumsum(0) - 1) * mask).sum(-1)
        at = (place[:, None] == torch.arange(4)).to(x.dtype)
        dispatch = torch.einsum("se,sc,s->sec", gates * mask, at, (place < 4).to(x.dtype))
        given = torch.einsum("sec,sm->ecm", dispatch, x)
        made = torch.cat([expert(given[e : e + 1]) for e, expert in enumerate(self.experts)])
        return torch.einsum("sec,ecm->sm", (dispatch != 0).to(x.dtype), made)


class Clamped(Masked):
    """Places are clamped to the last slot before `one_hot`, and the mask leaves out those that were."""

    def moe(self, x):
        weights, indices = self.router(x).softmax(1).topk(2)
        slots, tokens = 6, x.shape[0]
        chosen = F.one_hot(indices, self.num_experts)  # (s, k, e)
        counts = chosen.permute(1, 0, 2).reshape(-1, self.num_experts).cumsum(0)
        places = counts.view(2, tokens, self.num_experts).permute(1, 0, 2) - 1
        kept = (places < slots) * chosen
        place = F.one_hot((places * chosen).sum(-1).clamp(max=slots - 1), slots)
        mask = (place[:, :, None, :] * kept[..., None]).float()
        given = torch.einsum("sec,sm->ecm", mask.sum(1), x)
        combine = (mask * weights[:, :, None, None]).sum(1)
        return torch.einsum("sec,ecm->sm", combine, self.stacked(given))


class SharedSlots(Masked):
    """Wrong on purpose: second choices are counted from 0 again, so two tokens may share a slot."""

    def moe(self, x):
        gates = self.router(x).softmax(-1)
        chosen = gates.topk(2).indices
        combine = 0
        for number in range(2):
            mask = F.one_hot(chosen[:, number], self.num_experts)
            place = ((mask.cumsum(0) - 1) * mask).sum(1)
            at = (place[:, None] == torch.arange(x.shape[0])).to(x.dtype)
            combine = combine + torch.einsum("se,sc->sec", gates * mask, at)
        given = torch.einsum("sec,sm->ecm", (combine != 0).to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", combine, self.stacked(given))


class MixedSlots(FirstChoice):
    """An expert looks at all of its slots."""

    def each(self, slots):
        return self.stacked(slots) - slots.mean(1, keepdim=True)


class MixedExperts(FirstChoice):
    """What an expert gives depends on the other experts."""

    def each(self, slots):
        return self.stacked(slots).softmax(0)


class OddExpert(FirstChoice):
    """The last expert computes something else."""

    def each(self, slots):
        parts = [expert(part) for expert, part in zip(self.experts, slots.chunk(4), strict=True)]
        return torch.cat([*parts[:3], parts[3].tanh()])


class Reversed(FirstChoice):
    """The last expert's results stand where the first one's rows came from."""

    def each(self, slots):
        parts = slots.chunk(4)
        return torch.cat([expert(parts[3 - number]) for number, expert in enumerate(self.experts)])


class Flipped(FirstChoice):
    """Results stand in the slots of other rows."""

    def each(self, slots):
        return self.stacked(slots).flip(1)


class NextExpert(FirstChoice):
    """Stacked weights, and results that stand at the next expert."""

    def each(self, slots):
        return self.stacked(slots).roll(1, 0)


class OfSlots(nn.Linear):
    """A bias for each of four slots, which all experts have alike."""

    def __init__(self, shared):
        super().__init__(16, 16)
        self.of_slots = shared

    def forward(self, slots):
        return super().forward(slots) + self.of_slots


class BiasOfSlots(FixedCapacity):
    """What an expert adds depends on the slot."""

    def __init__(self):
        super().__init__()
        shared = nn.Parameter(torch.randn(4, 16))
        self.experts = nn.ModuleList(OfSlots(shared) for _ in range(4))


class SoftMixture(Masked):
    """Soft MoE (arXiv:2308.00951): every slot is a mean of all tokens. No mask is sparse."""

    def __init__(self):
        super().__init__()
        self.slots = nn.Parameter(torch.randn(16, 4, 3))

    def moe(self, x):
        logits = torch.einsum("sm,mec->sec", x, self.slots)
        given = torch.einsum("sec,sm->ecm", logits.softmax(0), x)
        combine = logits.flatten(1).softmax(1).view(logits.shape)
        return torch.einsum("sec,ecm->sm", combine, self.stacked(given))


SPARSE = [
    FirstChoice, TwoChoices, SeveralHot, OuterProducts, LoopOfChoices, Groups, FloatMasks, RoomyOneHot, ChoicesFirst,
    PlacesOfEach, FixedCapacity, Clamped,
]  # fmt: skip
