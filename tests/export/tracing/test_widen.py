"""Example dimensions of size 1 become dynamic all the same, unless they are broadcast."""

from __future__ import annotations

import torch
from torch import nn

from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.trace import trace
from moe_export.export.tracing.widen import widened


class Attention(nn.Module):
    def forward(self, query, key, mask):
        energy = query @ key.transpose(-1, -2)
        return energy.masked_fill(mask == 0, -1e9).softmax(-1)


def shapes(example):
    return {name: tuple(tensor.shape) for name, tensor in example.items()}


def test_a_batch_of_one(tools):
    graph = tools.graph(nn.Linear(4, 4), torch.randn(1, 4))
    assert graph.traced.inputs == {"input": ("batch", 4)}
    for batch in (1, 2, 7):
        tools.equal(graph, torch.randn(batch, 4))


def test_a_batch_of_one_in_several_inputs_is_widened_together(tools):
    class Sum(nn.Module):
        def forward(self, x, y):
            return torch.bmm(x, y)

    subject = tools.subject(Sum(), torch.ones(1, 3, 4), torch.ones(1, 4, 5))
    assert shapes(widened(subject, DimRequest())) == {"x": (2, 3, 4), "y": (2, 4, 5)}


def test_batch_and_length_of_one(tools):
    graph = tools.graph(nn.Linear(4, 4), torch.randn(1, 1, 4))
    assert graph.traced.inputs == {"input": ("batch", "sequence", 4)}
    tools.equal(graph, torch.randn(3, 5, 4))


def test_a_mask_that_is_broadcast_over_heads_stays_one(tools):
    """Two heads would take a mask of 2, and no other: that is chance, not a dimension."""
    subject = tools.subject(
        Attention(), torch.ones(3, 2, 5, 4), torch.ones(3, 2, 6, 4), torch.ones(3, 1, 5, 6)
    )
    assert shapes(widened(subject, DimRequest()))["mask"] == (3, 1, 5, 6)
    traced = trace(subject)
    assert traced.inputs["mask"][:3] == ("batch", 1, "height")
    assert "a size of 1 is broadcast, and was not widened" in str(traced.fixed[0])


def test_what_the_user_wants_fixed_is_not_widened(tools):
    subject = tools.subject(nn.Linear(4, 4), torch.ones(1, 1, 4))
    request = DimRequest(True, {("input", 1): None})
    assert shapes(widened(subject, request)) == {"input": (1, 2, 4)}


def test_a_size_that_must_be_one_stays(tools):
    class One(nn.Module):
        def forward(self, x):
            return x.reshape(4)

    assert trace(tools.subject(One(), torch.ones(1, 4))).inputs == {"x": (1, 4)}
