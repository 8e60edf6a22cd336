"""A traced program with folded loops, run: what the model computes, at lengths that no trace had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from slow_cases import one_in
from torch import nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.recurrence.recurrences import fold_recurrences
from moe_export.export.torch_compat.opaque import opaque_operator
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.needless import run_program
from moe_export.export.tracing.trace import trace
from moe_export.export.tracing.traced_loops import DOMAIN, END, of_loops


def forwards(self, x):
    state, collected = x.new_zeros(x.shape[0], 4), []
    for step in range(x.shape[1]):
        state = self.linear(state).tanh() + x[:, step]
        collected.append(state)
    return torch.stack(collected, 1), state


def backwards(self, x):
    state, collected = x.new_zeros(x.shape[0], 4), []
    for step in reversed(range(x.shape[1])):
        state = self.linear(state).tanh() + x[:, step]
        collected.insert(0, state)
    return (torch.stack(collected, 2),)


def swapped(self, x):
    """Each state is made of the other one's last value."""
    a, b = x.new_zeros(x.shape[0], 4), x.new_ones(x.shape[0], 4)
    for step in range(x.shape[1]):
        a, b = b + x[:, step], self.linear(a)
    return a, b


def without_elements(self, x):
    state = x[:, 0]
    for _ in range(x.shape[1]):
        state = self.linear(state).tanh()
    return (state,)


def one_after_the_other(self, x):
    first, _ = forwards(self, x)
    second, last = forwards(self, first * x)
    return first + second, last


def all_but_the_first(self, x):
    """No step at length 1."""
    state = x[:, 0]
    for step in range(1, x.shape[1]):
        state = self.linear(state).tanh() + x[:, step]
    return (state,)


LOOPS = [forwards, backwards, swapped, without_elements, one_after_the_other, all_but_the_first]


class Looped(nn.Module):
    def __init__(self, loop):
        super().__init__()
        self.loop, self.linear = loop, nn.Linear(4, 4)

    def forward(self, x):
        return self.loop(self, x)


@pytest.mark.parametrize("loop", one_in(2, LOOPS))
@torch.no_grad()
def test_a_program_with_loops_computes_what_the_model_does(loop):
    torch.manual_seed(0)
    module = Looped(loop).eval()
    subject = make_subject(module, (torch.randn(2, 7, 4),), {}, source=Path(__file__), how="")
    traced = trace(fold_recurrences(subject, DimRequest()).subject)
    assert (DOMAIN, END) in [opaque_operator(node) for node in traced.program.graph.nodes]
    for length in (1, 2, 6, 7, 8, 23):
        x = torch.randn(3, length, 4)
        found, wanted = run_program(traced, [x.clone()]), module(x)
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


def around(self, x):
    """An einsum that a loop reads, one in it, and one behind it."""
    drive = torch.einsum("btc,cd->btd", x, self.linear.weight)
    state, collected = x.new_zeros(x.shape[0], 4), []
    for step in range(x.shape[1]):
        state = torch.einsum("bc,dc->bd", state, self.linear.weight).tanh() + drive[:, step]
        collected.append(state)
    return (torch.einsum("btd,btd->bt", torch.stack(collected, 1), x),)


@torch.no_grad()
def test_of_loops_is_what_they_compute_and_read_and_nothing_behind_them():
    subject = make_subject(Looped(around).eval(), (torch.randn(2, 7, 4),), {}, source=Path(__file__), how="")
    graph = trace(fold_recurrences(subject, DimRequest()).subject).program.graph
    found = of_loops(graph)
    einsums = {str(node.args[0]): node.name in found for node in graph.nodes if "einsum" in str(node.target)}
    assert einsums == {"btc,cd->btd": True, "bc,dc->bd": True, "btd,btd->bt": False}
    assert of_loops(trace(subject).program.graph) == frozenset()
