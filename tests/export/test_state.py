"""Buffers that a model changes: every call, and the graph, starts from the same ones."""

from __future__ import annotations

import torch
from torch import nn

from moe_export.export.state import Buffers


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("cache", None)
        self.register_buffer("constant", torch.tensor([float("nan")]))

    def forward(self, x):
        self.calls += 1
        self.cache = x
        return x + self.calls


def test_changed_and_restored():
    model = nn.Sequential(Counter())
    before = Buffers.of(model)
    tensor = model[0].calls
    model(torch.ones(1))
    assert before.changed() == {"0.calls", "0.cache"}
    before.restore()
    assert before.changed() == set()
    assert model[0].calls is tensor
    assert model[0].cache is None


def test_only_the_named_ones_are_saved():
    model = Counter()
    before = Buffers.of(model, frozenset({"cache"}))
    model(torch.ones(1))
    before.restore()
    assert model.cache is None
    assert model.calls == 1


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.total += x.sum(0)
        return x + self.total


def test_every_call_of_a_subject_starts_anew(tools):
    subject = tools.subject(Running(), torch.ones(2, 3))
    assert subject.changed == {"total"}
    x = torch.randn(4, 3)
    assert torch.equal(subject.call([x])[0], subject.call([x])[0])
    assert torch.equal(subject.module.total, torch.zeros(3))


def test_the_graph_starts_from_the_files_values(tools):
    graph = tools.graph(Running(), torch.ones(2, 3))
    tools.equal(graph, torch.randn(4, 3))
    tools.equal(graph, torch.randn(1, 3))
    note = "buffer total changes with every call of the model; the graph always starts from its first value"
    assert note in graph.notes


def test_a_cache_that_grows_on_demand(tools):
    class Rotary(nn.Module):
        cached = None

        def forward(self, x):
            if self.cached is None or len(self.cached) < x.shape[1]:
                self.cached = torch.arange(x.shape[1]).float().cos()
            return x * self.cached[: x.shape[1]]

    tools.equal(tools.graph(Rotary(), torch.ones(2, 3)), torch.randn(4, 3))
