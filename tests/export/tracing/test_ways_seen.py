"""What inputs of several kinds are seen to do at a model's decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export import trace
from moe_export.export.tracing.notes import notes_on
from moe_export.export.tracing.ways_seen import ways_seen


class Decides(nn.Module):
    def forward(self, x):
        if x.max() > 1 and x.min() > -5:
            x = x + 1
        y = torch.zeros_like(x)
        if x.sum() > 1e9:
            y[:, 0] = 1
        if x.mean().item() > 0:
            return x + y
        return x - y


def test_a_side_that_no_input_takes_is_unproven(tools):
    subject = tools.subject(Decides(), torch.randn(4, 3))
    traced = trace(subject)
    seen = ways_seen(subject, traced, traced.decisions)
    first = Decides.forward.__code__.co_firstlineno
    answers = {int(place.rpartition(":")[2]) - first: found for place, found in seen.items()}
    assert answers == {1: {True, False}, 4: {False}, 6: {True, False}}
    notes = notes_on(subject, traced, None, seen)
    assert [note.partition("takes one")[2] for note in notes] == [
        "",
        "; no input that was tried goes the other way",
        "",
    ]


def test_a_trace_that_differs_where_the_example_does_not_go_is_refused(tools):
    subject = tools.subject(Decides(), torch.rand(4, 3))
    traced = trace(subject)
    other = replace(traced, program=trace(tools.subject(nn.ReLU(), torch.rand(4, 3))).program)
    with pytest.raises(NotExportableError, match="differs from the model for another input"):
        ways_seen(subject, other, traced.decisions)


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.rand(4))

    def forward(self, x):
        index = x.abs().long()
        return self.table[index] if index.max() < 4 else torch.zeros_like(x)


def test_a_side_that_fails_where_it_is_not_taken_is_refused(tools):
    subject = tools.subject(Looks(), torch.rand(4, 3))
    traced = trace(subject)
    with pytest.raises(NotExportableError, match="fails for an input that takes the other"):
        ways_seen(subject, traced, traced.decisions)
