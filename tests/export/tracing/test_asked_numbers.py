"""Numbers that only the graph knows, compared and computed with as Python does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export import trace


class Asks(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        return self.how(self, x)


def compared(self, x):
    largest = x.max().item()
    if largest > 0.1:  # of float32 and float64, 0.1 is not the same
        return self.a(x)
    return x if largest > -1 and not -largest > 2 else x - 1


def computed(self, x):
    scale = x.abs().max().item()
    count = (x > 0).sum().item()
    if scale / 2 + 1 > 3 - count / 2:
        x = x / scale
    y = (x > 0) * count + 2 * scale
    return y + (scale if scale > 1 else x.mean().item())


def as_int_and_float(self, x):
    if int(x.sum()) >= 1 or float(x.min()) < -3:
        x = self.a(x)
    return x * float(x.max())


@pytest.mark.parametrize("how", [compared, computed, as_int_and_float], ids=lambda how: how.__name__)
@pytest.mark.slow_but_one
def test_numbers_are_compared_as_python_does(tools, how):
    graph = tools.graph(Asks(how), torch.randn(5, 4))
    assert any("decision on values" in note for note in graph.notes)
    torch.manual_seed(1)
    x = torch.randn(3, 4)
    limit = torch.full((2, 4), 0.1)
    for each in (
        x,
        -x,
        x.abs() + 1,
        -x.abs() - 1,
        -x.abs() - 3,
        x / 100,
        limit,
        -limit,
        9 * limit,
        13 * limit,
    ):
        tools.equal(graph, each)


def as_size(self, x):
    return x[: x.sum().item() > 0 and int(x.abs().sum())]


def test_a_size_that_values_decide_is_refused_as_before(tools):
    with pytest.raises(NotExportableError):
        trace(tools.subject(Asks(as_size), torch.rand(5, 4)))
