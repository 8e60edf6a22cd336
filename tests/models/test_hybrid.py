"""The hybrid language model: made of the blocks of the other files, causal, able to learn."""

import pytest
import torch
import torch.nn.functional as F

from moe_export.models.hybrid import HybridLM


@pytest.mark.parametrize(("b", "length"), [(1, 1), (2, 10), (3, 17)])
def test_logits_are_the_blocks_in_a_row(b, length):
    model = HybridLM(vocab_size=50, d_model=16).double().eval()
    ids = torch.randint(0, 50, (b, length))
    logits = model(ids)
    assert logits.shape == (b, length, 50)
    x = model.embedding.weight[ids]
    x = x + model.mamba(model.mamba_norm(x))
    y = model.attention_norm(x)
    x = x + model.attention(y, y, y, torch.ones(length, length).tril())
    x = x + model.moe(model.moe_norm(x))[0]
    torch.testing.assert_close(logits, model.norm(x) @ model.lm_head.weight.T)


def test_no_logit_depends_on_a_later_token():
    model = HybridLM(vocab_size=50, d_model=16).double().eval()
    ids = torch.randint(0, 50, (2, 12))
    before = model(ids)
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 50
    after = model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert (before[:, 8:] - after[:, 8:]).abs().amax(dim=(0, 2)).min() > 1e-6


def test_learns_a_sequence():
    model = HybridLM(vocab_size=20, d_model=16)
    ids = torch.randint(0, 20, (2, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_refuses_a_token_outside_the_vocabulary():
    with pytest.raises(IndexError, match="out of range"):
        HybridLM(vocab_size=50)(torch.tensor([[50]]))
