"""GShard's Mixture of Experts (arXiv:2006.16668), as DeepSpeed-MoE (arXiv:2201.05596) writes it in PyTorch.

Every expert has the same number of slots. A token that finds its expert full is dropped: the expert adds
nothing to it. Dispatch and combine are then einsums over a mask, and no shape depends on the data.

Glossary:
    b: batch            l: sequence length      m: model size
    s: tokens, b * l    e: experts              c: capacity, the slots of one expert
    f: width of an expert
"""

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def get_capacity(num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int) -> int:
    """Slots an expert has: ceil(tokens / experts * factor), at least `min_capacity`.

    In integers, and with `sym_max` for `max`, so that a tracer keeps it a function of the token count.
    """
    factor = Fraction(capacity_factor).limit_denominator(1000)
    numerator = num_tokens * factor.numerator
    denominator = num_experts * factor.denominator
    slots = (numerator + denominator - 1) // denominator
    capacity: int = torch.sym_max(slots, min_capacity)  # type: ignore[no-untyped-call]
    return capacity


def one_hot_slots(locations: Tensor, capacity: int) -> Tensor:
    """Mark each token's slot: (s,) → (s, c) bool.

    Unlike `F.one_hot`, which needs to know the number of classes, this traces with a symbolic capacity.
    """
    slots = torch.arange(capacity, device=locations.device)  # (c,)
    return locations.unsqueeze(1) == slots


def load_balancing_loss(gates: Tensor, mask1: Tensor) -> Tensor:
    """GShard, section 2.2: the share of tokens times the mean gate, summed over experts; 1 when even.

    Args:
        gates: (s, e).
        mask1: (s, e), the first choices, before any token is dropped.
    """
    me = gates.mean(dim=0)  # (e,)
    ce = mask1.type_as(gates).mean(dim=0)  # (e,)
    return torch.sum(me * ce) * gates.shape[1]


def top1gating(logits: Tensor, capacity_factor: float, min_capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Switch routing (arXiv:2101.03961): one expert a token, earlier tokens first.

    Args:
        logits: (s, e).
        capacity_factor: slots over what an even load needs.
        min_capacity: the fewest slots of an expert.

    Returns:
        combine_weights: (s, e, c), the weight of a token in the slot that it got.
        dispatch_mask: (s, e, c) bool, where combine_weights is not 0.
        l_aux: the load balancing loss, a scalar.
    """
    gates = F.softmax(logits, dim=1)  # (s, e)
    num_tokens, num_experts = gates.shape
    capacity = get_capacity(num_tokens, num_experts, capacity_factor, min_capacity)

    mask1 = F.one_hot(torch.argmax(gates, dim=1), num_classes=num_experts)  # (s, e)
    l_aux = load_balancing_loss(gates, mask1)

    locations1 = torch.cumsum(mask1, dim=0) - 1  # (s, e): the tokens before this one
    mask1 = mask1 * torch.lt(locations1, capacity)
    locations1_s = torch.sum(locations1 * mask1, dim=1)  # (s,): the slot

    gates1 = gates * mask1.type_as(gates)  # (s, e)
    locations1_sc = one_hot_slots(locations1_s, capacity).type_as(gates)  # (s, c)
    combine_weights = torch.einsum("se,sc->sec", gates1, locations1_sc)
    dispatch_mask = combine_weights.bool()
    return combine_weights, dispatch_mask, l_aux


def top2gating(logits: Tensor, capacity_factor: float, min_capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """GShard routing: two experts a token, every first choice before any second one.

    Arguments and results are those of `top1gating`, with twice the slots. The weights of a token's experts
    sum to 1 over those that had a slot for it.
    """
    gates = F.softmax(logits, dim=1)  # (s, e)
    num_tokens, num_experts = gates.shape
    capacity = get_capacity(num_tokens, num_experts, 2 * capacity_factor, min_capacity)

    mask1 = F.one_hot(torch.argmax(gates, dim=1), num_classes=num_experts)  # (s, e)
    logits_except1 = logits.masked_fill(mask1.bool(), float("-inf"))
    mask2 = F.one_hot(torch.argmax(logits_except1, dim=1), num_classes=num_experts)  # (s, e)
    l_aux = load_balancing_loss(gates, mask1)

    locations1 = torch.cumsum(mask1, dim=0) - 1  # (s, e)
    locations2 = torch.cumsum(mask2, dim=0) - 1 + torch.sum(mask1, dim=0, keepdim=True)  # (s, e)
    mask1 = mask1 * torch.lt(locations1, capacity)
    mask2 = mask2 * torch.lt(locations2, capacity)
    locations1_s = torch.sum(locations1 * mask1, dim=1)  # (s,)
    locations2_s = torch.sum(locations2 * mask2, dim=1)  # (s,)

    mask1_float = mask1.type_as(gates)
    mask2_float = mask2.type_as(gates)
    gates1_s = torch.einsum("se,se->s", gates, mask1_float)
    gates2_s = torch.einsum("se,se->s", gates, mask2_float)
    denom_s = torch.clamp(gates1_s + gates2_s, min=torch.finfo(gates.dtype).eps)
    gates1 = torch.einsum("s,se->se", gates1_s / denom_s, mask1_float)
    gates2 = torch.einsum("s,se->se", gates2_s / denom_s, mask2_float)

    locations1_sc = one_hot_slots(locations1_s, capacity).type_as(gates)  # (s, c)
    locations2_sc = one_hot_slots(locations2_s, capacity).type_as(gates)  # (s, c)
    combine1_sec = torch.einsum("se,sc->sec", gates1, locations1_sc)
    combine2_sec = torch.einsum("se,sc->sec", gates2, locations2_sc)
    combine_weights = combine1_sec + combine2_sec
    dispatch_mask = combine_weights.bool()
    return combine_weights, dispatch_mask, l_aux


class TopKGate(nn.Module):
    """The gate: k is 1 (Switch) or 2 (GShard)."""

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 2,
        capacity_factor: float = 1.0,
        min_capacity: int = 4,
        jitter_eps: float = 0.01,
    ) -> None:
        super().__init__()
        if k not in (1, 2):
            raise ValueError(f"k={k}: only top-1 and top-2 gating exist")
        if num_experts < k:
            raise ValueError(f"top-{k} gating needs at least {k} experts, not {num_experts}")
        self.wg = nn.Linear(model_dim, num_experts, bias=False)
        self.k = k
        self.capacity_factor = capacity_factor
        self.min_capacity = min_capacity
        self.jitter_eps = jitter_eps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route the tokens (s, m); see `top1gating` for what comes back."""
        if self.training:
            x = x * torch.empty_like(x).uniform_(1.0 - self.jitter_eps, 1.0 + self.jitter_eps)
        logits = self.wg(x)  # (s, e)
        gating = top1gating if self.k == 1 else top2gating
        return gating(logits, self.capacity_factor, self.min_capacity)


class MOELayer(nn.Module):
    """Gate, dispatch, experts, combine."""

    def __init__(
        self,
        model_dim: int = 32,
        hidden_dim: int = 64,
        num_experts: int = 4,
        k: int = 2,
        capacity_factor: float = 1.0,
        min_capacity: int = 4,
    ) -> None:
        super().__init__()
        self.gate = TopKGate(model_dim, num_experts, k, capacity_factor, min_capacity)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(model_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, model_dim))
            for _ in range(num_experts)
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Mix (b, l, m) → (b, l, m) and the load balancing loss, a scalar."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # (s, m)
        combine_weights, dispatch_mask, l_aux = self.gate(x)  # (s, e, c), (s, e, c), ()

        dispatched = torch.einsum("sec,sm->ecm", dispatch_mask.type_as(x), x)
        chunks = dispatched.chunk(len(self.experts), dim=0)  # e times (1, c, m)
        expert_outputs = [expert(chunk) for chunk, expert in zip(chunks, self.experts, strict=True)]
        expert_output = torch.cat(expert_outputs, dim=0)  # (e, c, m)

        combined = torch.einsum("sec,ecm->sm", combine_weights, expert_output)
        return combined.reshape(hidden_states.shape), l_aux


torch.manual_seed(0)
model = MOELayer(model_dim=32, hidden_dim=64, num_experts=4, k=2)
example_inputs = (torch.randn(2, 10, 32),)

if __name__ == "__main__":
    # Tokens 0 and 2 choose expert 0, token 1 chooses expert 1: the second slot of expert 1 stays empty.
    tokens = torch.tensor([[1.0] * 4, [2.0] * 4, [3.0] * 4])  # (s, m)
    choices = torch.tensor([[5.0, 0.0], [0.0, 5.0], [5.0, 0.0]])  # (s, e)
    _, slots, _ = top1gating(choices, capacity_factor=1.0, min_capacity=1)
    dispatched = torch.einsum("sec,sm->ecm", slots.type_as(tokens), tokens)
    print("dispatched", dispatched.int().tolist())

    model.eval()
    output, l_aux = model(*example_inputs)
    print("output", tuple(output.shape))
    print("l_aux", tuple(l_aux.shape))
