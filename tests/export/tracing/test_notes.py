"""What the report says about everything in which the graph is less than the model."""

from __future__ import annotations

import torch
from torch import nn

from moe_export.export.tracing.notes import notes_on
from moe_export.export.tracing.trace import trace


class Odd(nn.Module):
    def forward(self, x, unused, like, mode="fast"):
        return {
            "y": x * like.shape[0],
            "aux": 0,
            "length": x.shape[1],
            "cache": object(),
            "text": "t" * 100,
        }


def test_every_kind_of_note(tools):
    subject = tools.subject(Odd(), torch.ones(2, 3), torch.ones(4, 5), torch.ones(6, 7), mode="slow")
    assert notes_on(subject, trace(subject)) == [
        "output aux is the constant 0 and is dropped",
        "output length is a Python number that the model computes, and is dropped; return it as a tensor to keep it",
        "output cache is a object, not a tensor, and is dropped",
        f"output text is the constant '{'t' * 56}... and is dropped",
        "argument mode is fixed at 'slow'",
        "input unused has no influence on the outputs",
    ]


def test_nothing_to_say(tools):
    subject = tools.subject(nn.ReLU(), torch.ones(2, 3))
    assert notes_on(subject, trace(subject)) == []


def test_an_input_without_influence_stays_an_input(tools):
    class Ignores(nn.Module):
        def forward(self, x, unused):
            return x + 1

    graph = tools.graph(Ignores(), torch.ones(2, 3), torch.ones(4, 5))
    assert [value.name for value in graph.model.graph.inputs] == ["x", "unused"]
    tools.equal(graph, torch.randn(3, 3), torch.randn(1, 2))
