"""GShard gating against slot bookkeeping, one token after another, in float64."""

import math

import pytest
import torch

from moe_export.models.gshard_moe import MOELayer, TopKGate, get_capacity, top1gating, top2gating

SIZES = [(1, 2), (3, 2), (10, 4), (64, 8)]  # (s, e)


def ranked(scores):
    return sorted(range(len(scores)), key=lambda e: -scores[e].item())


def bookkeeping(logits, k, capacity):
    """Hand out slots: all first choices in token order, then all second ones. token → {expert: slot}."""
    taken = [0] * logits.shape[1]
    slots = [{} for _ in logits]
    for choice in range(k):
        for token, row in enumerate(logits):
            expert = ranked(row)[choice]
            if taken[expert] < capacity:
                slots[token][expert] = taken[expert]
            taken[expert] += 1  # a token that finds no slot is still counted
    return slots


def expected_masks(logits, k, capacity):
    gates = torch.softmax(logits, dim=1)
    combine = torch.zeros(*logits.shape, capacity, dtype=logits.dtype)
    for token, slots in enumerate(bookkeeping(logits, k, capacity)):
        total = sum(gates[token, e] for e in slots) if k == 2 else 1.0
        for expert, slot in slots.items():
            combine[token, expert, slot] = gates[token, expert] / total
    return combine


@pytest.mark.parametrize(("s", "e"), SIZES)
@pytest.mark.parametrize(("factor", "least"), [(1.0, 1), (1.0, 4), (0.5, 1), (1.25, 2)])
@pytest.mark.parametrize("k", [1, 2])
def test_masks_equal_bookkeeping(s, e, factor, least, k):
    logits = torch.randn(s, e, dtype=torch.float64)
    gating = top1gating if k == 1 else top2gating
    combine, dispatch, _ = gating(logits, factor, least)
    capacity = max(least, math.ceil(k * s / e * factor))
    assert combine.shape == dispatch.shape == (s, e, capacity)
    assert dispatch.dtype == torch.bool
    expected = expected_masks(logits, k, capacity)
    torch.testing.assert_close(combine, expected)
    assert torch.equal(dispatch, expected > 0)
    assert dispatch.sum(dim=0).max() <= 1, "two tokens in one slot"


@pytest.mark.parametrize("k", [1, 2])
def test_a_full_expert_drops_later_tokens(k):
    logits = torch.tensor([[9.0, 5.0, 0.0, 0.0]] * 12, dtype=torch.float64)
    gating = top1gating if k == 1 else top2gating
    _, dispatch, _ = gating(logits, 1.0, 1)
    capacity = 3 * k
    kept = dispatch.any(dim=2)
    assert kept[:capacity, 0].all()
    assert not kept[capacity:, 0].any()
    assert kept[:, 1].sum() == (capacity if k == 2 else 0)
    assert not kept[:, 2:].any()


@pytest.mark.parametrize("k", [1, 2])
def test_loss_is_one_when_even_and_grows_with_the_imbalance(k):
    gating = top1gating if k == 1 else top2gating
    even = 20 * torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert gating(even, 1.0, 1)[2].item() == pytest.approx(1.0, abs=1e-6)
    uneven = 20 * torch.eye(4, dtype=torch.float64)[torch.zeros(12, dtype=torch.long)]
    assert gating(uneven, 1.0, 1)[2].item() == pytest.approx(4.0, abs=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 1.25, 2.0])
@pytest.mark.parametrize("experts", [1, 2, 3, 8])
def test_capacity_is_the_ceiling(factor, experts):
    for tokens in range(50):
        exact = math.ceil(round(tokens * factor / experts, 9))
        assert get_capacity(tokens, experts, factor, 1) == max(1, exact)
        assert get_capacity(tokens, experts, factor, 6) == max(6, exact)


def test_worked_example():
    tokens = torch.tensor([[1.0] * 4, [2.0] * 4, [3.0] * 4])
    choices = torch.tensor([[5.0, 0.0], [0.0, 5.0], [5.0, 0.0]])
    _, slots, _ = top1gating(choices, capacity_factor=1.0, min_capacity=1)
    dispatched = torch.einsum("sec,sm->ecm", slots.type_as(tokens), tokens)
    assert dispatched.tolist() == [[[1] * 4, [3] * 4], [[2] * 4, [0] * 4]]


@pytest.mark.parametrize(("b", "length"), [(1, 1), (2, 10), (3, 17)])
@pytest.mark.parametrize("k", [1, 2])
def test_layer_equals_a_loop_over_tokens(b, length, k):
    layer = MOELayer(12, 20, num_experts=4, k=k, capacity_factor=0.75, min_capacity=1).double().eval()
    x = torch.randn(b, length, 12, dtype=torch.float64)
    output, l_aux = layer(x)
    tokens = x.reshape(-1, 12)
    capacity = max(1, math.ceil(k * b * length / 4 * 0.75))
    combine = expected_masks(layer.gate.wg(tokens), k, capacity)
    expected = torch.zeros_like(tokens)
    for token, expert, slot in combine.nonzero().tolist():
        expected[token] += combine[token, expert, slot] * layer.experts[expert](tokens[token])
    torch.testing.assert_close(output, expected.reshape(x.shape))
    assert l_aux.shape == ()


def test_jitter_is_for_training_only():
    gate = TopKGate(12, 4, k=1, min_capacity=1)
    x = torch.randn(10, 12)
    first, second = gate.train()(x)[2], gate(x)[2]
    assert first != second
    first, second = gate.eval()(x)[2], gate(x)[2]
    assert first == second
    expected = top1gating(gate.wg(x), 1.0, 1)[0]
    torch.testing.assert_close(gate(x)[0], expected)


def test_refusals():
    with pytest.raises(ValueError, match="k=3: only top-1 and top-2 gating exist"):
        TopKGate(12, 4, k=3)
    with pytest.raises(ValueError, match="top-2 gating needs at least 2 experts, not 1"):
        MOELayer(12, 20, num_experts=1, k=2)
