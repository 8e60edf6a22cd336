"""SparseMoe against a dense loop over tokens, in float64."""

import pytest
import torch
import torch.nn.functional as F

from moe_export.models.sparse_moe import Expert, SparseMoe


def swiglu(expert, x):
    gate, up, down = (p.weight for p in (expert.gate_proj, expert.up_proj, expert.down_proj))
    return down @ ((gate @ x) * torch.sigmoid(gate @ x) * (up @ x))


def dense(moe, x):
    """One token after another: its k best experts, weighted, and the shared ones."""
    outputs, weights = [], []
    for token in x.reshape(-1, x.shape[-1]):
        scores = torch.softmax(moe.gate.weight @ token, dim=0)
        best = sorted(range(moe.num_experts), key=lambda e: -scores[e].item())[: moe.top_k]
        total = sum(scores[e] for e in best)
        out = sum(scores[e] / total * swiglu(moe.experts[e], token) for e in best)
        outputs.append(out + sum(swiglu(shared, token) for shared in moe.shared_experts))
        weights.append(torch.stack([scores[e] / total for e in best]))
    return torch.stack(outputs).reshape(x.shape), torch.stack(weights)


@pytest.mark.parametrize(("b", "length"), [(1, 1), (1, 7), (2, 10), (3, 33)])
@pytest.mark.parametrize(("experts", "k", "shared"), [(8, 2, 1), (4, 1, 0), (3, 3, 2)])
def test_equals_a_loop_over_tokens(b, length, experts, k, shared):
    moe = SparseMoe(12, 20, experts, k, shared).double()
    x = torch.randn(b, length, 12, dtype=torch.float64)
    output, weights = moe(x)
    expected_output, expected_weights = dense(moe, x)
    assert weights.shape == (b * length, k)
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("favourite", range(4))
def test_every_token_to_one_expert(favourite):
    moe = SparseMoe(12, 20, 4, 1, 0).double()
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[favourite] = 1.0
    x = torch.rand(2, 5, 12, dtype=torch.float64)  # positive, so the favourite's logit is the highest
    output, weights = moe(x)
    expected = torch.stack([swiglu(moe.experts[favourite], t) for t in x.reshape(-1, 12)]).reshape(x.shape)
    torch.testing.assert_close(output, expected)
    assert weights.eq(1.0).all()


def test_experts_see_only_their_tokens():
    moe = SparseMoe(12, 20, 8, 2, 0)
    rows = []
    for expert in moe.experts:
        expert.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
    moe(torch.randn(2, 10, 12))
    assert len(rows) == 8
    assert sum(rows) == 2 * 10 * 2


def test_no_tokens():
    output, weights = SparseMoe(12, 20, 4, 2)(torch.zeros(2, 0, 12))
    assert output.shape == (2, 0, 12)
    assert weights.shape == (0, 2)


def test_input_need_not_be_contiguous_and_is_not_changed():
    moe = SparseMoe(12, 20, 4, 2)
    x = torch.randn(10, 2, 12).transpose(0, 1)
    before = x.clone()
    torch.testing.assert_close(moe(x)[0], moe(x.contiguous())[0])
    assert torch.equal(x, before)


def test_gradients_reach_gate_and_experts():
    moe = SparseMoe(12, 20, 4, 2)
    moe(torch.randn(4, 16, 12))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in moe.parameters())


def test_expert_is_swiglu():
    expert = Expert(6, 10).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = F.linear(
        F.silu(F.linear(x, expert.gate_proj.weight)) * F.linear(x, expert.up_proj.weight),
        expert.down_proj.weight,
    )
    torch.testing.assert_close(expert(x), expected)
    torch.testing.assert_close(expert(x), torch.stack([swiglu(expert, row) for row in x]))


@pytest.mark.parametrize("k", [0, 5])
def test_refuses_more_choices_than_experts(k):
    with pytest.raises(ValueError, match=f"num_experts_per_tok={k} must be 1 to num_experts=4"):
        SparseMoe(num_experts=4, num_experts_per_tok=k)
