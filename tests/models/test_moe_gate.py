"""MoEGate against the definitions, written as loops over tokens in float64."""

import pytest
import torch

from moe_export.models.moe_gate import MoEGate


def gate_and_input(b, length, d=16, **options):
    gate = MoEGate(hidden_size=d, **options).double()
    return gate, torch.randn(b, length, d, dtype=torch.float64)


def scores_of(gate, x):
    return torch.softmax(x @ gate.weight.T, dim=-1)  # (b, l, e)


@pytest.mark.parametrize(("b", "length"), [(1, 1), (1, 7), (3, 5)])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_chooses_the_highest_scores(b, length, k):
    gate, x = gate_and_input(b, length, num_experts=8, num_experts_per_tok=k)
    idx, weight, aux = gate.eval()(x)
    assert idx.shape == weight.shape == (b * length, k)
    assert idx.dtype == torch.int64
    assert type(aux) is int
    assert aux == 0
    for token, scores in enumerate(scores_of(gate, x).reshape(-1, 8)):
        best = sorted(range(8), key=lambda e: -scores[e].item())[:k]
        assert sorted(idx[token].tolist()) == sorted(best)
        total = sum(scores[e] for e in best) if k > 1 else 1.0
        expected = torch.stack([scores[e] / total for e in idx[token].tolist()])
        torch.testing.assert_close(weight[token], expected)


def test_normalised_weights_sum_to_one():
    gate, x = gate_and_input(2, 9, num_experts=8, num_experts_per_tok=3)
    _, weight, _ = gate.eval()(x)
    torch.testing.assert_close(weight.sum(-1), torch.ones(18, dtype=torch.float64))


def test_weights_that_are_not_normalised_are_scaled():
    options = {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False}
    gate, x = gate_and_input(2, 9, routed_scaling_factor=2.5, **options)
    idx, weight, _ = gate.eval()(x)
    torch.testing.assert_close(weight, 2.5 * scores_of(gate, x).reshape(-1, 8).gather(1, idx))


def balance(scores, idx, k):
    """One group of tokens: e * (share of the choices) * (mean score), summed over experts."""
    tokens, experts = scores.shape
    total = 0.0
    for e in range(experts):
        load = sum(1 for choice in idx.flatten().tolist() if choice == e) / (tokens * k)
        total += experts * load * scores[:, e].mean().item()
    return total


@pytest.mark.parametrize(("b", "length"), [(1, 1), (2, 6), (3, 10)])
def test_sequence_loss_is_the_mean_over_sequences(b, length):
    gate, x = gate_and_input(
        b, length, num_experts=4, num_experts_per_tok=2, aux_loss_alpha=0.1, seq_aux=True
    )
    idx, _, aux = gate.train()(x)
    scores, chosen = scores_of(gate, x), idx.reshape(b, length, 2)
    expected = 0.1 * sum(balance(scores[i], chosen[i], 2) for i in range(b)) / b
    assert aux.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("b", "length"), [(1, 1), (2, 6), (3, 10)])
def test_token_loss_counts_over_the_whole_batch(b, length):
    gate, x = gate_and_input(
        b, length, num_experts=4, num_experts_per_tok=2, aux_loss_alpha=0.1, seq_aux=False
    )
    idx, _, aux = gate.train()(x)
    expected = 0.1 * balance(scores_of(gate, x).reshape(-1, 4), idx, 2)
    assert aux.item() == pytest.approx(expected, rel=1e-12)


def test_the_two_losses_differ_on_unbalanced_sequences():
    gate, x = gate_and_input(2, 6, num_experts=4, num_experts_per_tok=1, aux_loss_alpha=1.0)
    with torch.no_grad():
        gate.weight.copy_(4 * torch.eye(4, 16))
    x = torch.zeros_like(x)
    x[0, :, 0] = 1.0  # the first sequence asks for expert 0 only,
    x[1, :, 1] = 1.0  # the second for expert 1 only
    _, _, per_sequence = gate.train()(x)
    gate.seq_aux = False
    _, _, over_tokens = gate(x)
    assert per_sequence > over_tokens > 1.0


@pytest.mark.parametrize("seq_aux", [True, False])
def test_the_loss_pulls_the_gate(seq_aux):
    gate, x = gate_and_input(2, 6, num_experts=4, num_experts_per_tok=2, aux_loss_alpha=0.1, seq_aux=seq_aux)
    _, _, aux = gate.train()(x)
    aux.backward()
    assert gate.weight.grad.abs().max() > 0


def test_no_alpha_no_loss():
    gate, x = gate_and_input(2, 6, aux_loss_alpha=0.0)
    assert gate.train()(x)[2] == 0


@pytest.mark.parametrize("k", [0, 9])
def test_refuses_more_choices_than_experts(k):
    with pytest.raises(ValueError, match=f"num_experts_per_tok={k} must be 1 to num_experts=8"):
        MoEGate(num_experts=8, num_experts_per_tok=k)
