"""Places that are ruled out as the start of a loop, all at once, are places where none is found one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loops_that_stay import LOOPS
from torch import Tensor, nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.recurrence.canonicalize import canonicalize
from moe_export.export.recurrence.loop import Loop
from moe_export.export.recurrence.loops import Repeats, find_loops
from moe_export.export.recurrence.match_iterations import match_iterations
from moe_export.export.recurrence.period import LEAST_ITERATIONS, runs
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.trace import trace


class TwoStepsBack(nn.Module):
    """Each step reads the two before it, beside a loop over channels in each of which nothing carries over."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0])
        for t in range(x.shape[1]):
            a, b = b, torch.tanh(a + b * x[:, t])
        return torch.stack([torch.relu(b[:, c].exp()) for c in range(x.shape[2])], 1)


class ByChannel(nn.Module):
    """A loop over time inside of one over channels, which writes into columns of what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for c in range(x.shape[2]):
            h = torch.zeros_like(x[:, 0, 0])
            for t in range(x.shape[1]):
                h = torch.tanh(h + x[:, t, c])
                y[:, t, c] = h
        return y


MODULES = {
    "two_steps_back": TwoStepsBack(),
    "by_channel": ByChannel(),
    **{name: each[0] for name, each in LOOPS.items()},
}


def repeats(module: nn.Module, length: int) -> Repeats:
    subject = make_subject(module, (torch.randn(2, length, 4),), {}, source=Path(__file__), how="a test")
    return Repeats(canonicalize(trace(subject, DimRequest(True, {}), as_called=True).program))


@pytest.mark.parametrize("name", MODULES)
def test_no_loop_begins_where_none_is_looked_for(name: str) -> None:
    found = repeats(MODULES[name], 8)
    looked_at = ruled_out = 0
    for period in range(1, len(found.nodes) // LEAST_ITERATIONS + 1):
        for run in runs(found.tokens, period):
            starts = found.reads.starts(run)
            last = run.stop - LEAST_ITERATIONS * period
            for start in range(run.start, min(run.start + 2 * period, last + 1)):
                looked_at += 1
                if start not in starts:
                    ruled_out += 1
                    made = match_iterations(found.nodes, start, period, run.stop, found.locate)
                    assert not isinstance(made, Loop), (period, start)
    assert 0 < ruled_out < looked_at or name in LOOPS


def test_loops_inside_of_loops_are_found() -> None:
    traces = [repeats(ByChannel(), length) for length in (6, 7)]
    find_loops(traces)
    assert [loop.iterations for loop in traces[0].loops] == [5, 5, 5, 5]  # the first step begins from zeros
