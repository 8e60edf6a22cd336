"""Checks of values that end a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def check_finite(value, name):
    assert torch.isfinite(value).all(), f"{name} contains NaN"


class Checked(nn.Module):
    """A router as it is written with care."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        scores = self.router(x)
        check_finite(scores, "scores")
        weights, chosen = scores.softmax(-1).topk(2)
        if not (chosen < 3).all():
            raise ValueError("no such expert")
        if bool((weights < 0).any()):
            raise ValueError("negative weights")
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out


def test_checks_are_taken_as_passed_and_named(tools):
    graph = tools.graph(Checked(), torch.randn(5, 4))
    assert sum("is taken as passed" in note for note in graph.notes) == 3
    assert any("test_checks.py:11" in note for note in graph.notes)
    assert any("lowered as" in note for note in graph.notes)
    for tokens in (1, 2, 5, 30):
        tools.equal(graph, torch.randn(tokens, 4))


class Decides(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "computes" and x.min() < 0:
            x = x - x.min()
        if self.how == "caught":
            try:
                if x.min() < 0:
                    raise ValueError("negative")
            except ValueError:
                x = x.relu()
        if self.how == "two":
            assert x.min() < 9 or x.max() > 9
        return x + 1


@pytest.mark.parametrize("how", ["computes", "caught", "two"])
@pytest.mark.slow_but_one
def test_what_may_be_more_than_a_check_is_asked_in_the_graph(tools, how):
    graph = tools.graph(Decides(how), torch.rand(5, 4))
    assert any("decision on values" in note for note in graph.notes)
    for factor in (1, -1, 8):
        tools.equal(graph, factor * torch.rand(5, 4))
