"""Libraries that compile a program for the integers of a call."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

SOURCE = """
import torch


def grouped(x, size):  # (b, t, d) -> (b * t / size, size * d)
    b, t, d = (int(length) for length in x.shape)
    if t % size:
        raise ValueError(f"{t} is no multiple of {size}")
    return compiled(f"torch.reshape(x, ({b * t // size}, {size * d}))")(x)


def outer(x, y):  # (b, t, d), (b, t, e) -> (b, t, d * e)
    b, t, d = (int(length) for length in x.shape)
    (c, u, e), rows = (int(length) for length in y.shape), f"({b}, {t}, {d}, 1)"
    if (b, t) != (c, u):
        raise ValueError("no common axes")
    code = f"torch.reshape(torch.multiply(torch.reshape(x, {rows}), torch.reshape(y, ({b}, {t}, 1, {e}))), "
    return compiled(f"{code}({b}, {t}, {d * e}))")(x, y)


def numbered(x):  # (b, t, d) -> (b, t, d), each step with its number added, in flat rows
    b, t, d = (int(length) for length in x.shape)
    steps = f"torch.reshape(torch.arange({t}), (1, {t}, 1))"
    return compiled(f"torch.reshape(torch.reshape(x, ({b * t}, {d})), ({b}, {t}, {d})) + {steps}")(x)


def compiled(code):
    return eval(f"lambda x, y=None: {code}", {"torch": torch})
"""


@pytest.fixture
def library(monkeypatch):
    """A library of the kind, under the name of one."""
    module = ModuleType("einx")
    exec(SOURCE, vars(module))
    monkeypatch.setitem(sys.modules, "einx", module)
    return module


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.project = nn.Linear(4, 3)

    def forward(self, x):
        return self.function(x, self.project(x)) + 0


@pytest.mark.parametrize("name", ["outer", "numbered"])
def test_sizes_stay_symbols_in_what_a_library_compiled(tools, library, name):
    function = library.outer if name == "outer" else lambda x, y: library.numbered(x)
    graph = tools.graph(Calls(function), torch.randn(2, 5, 4))
    assert graph.traced.inputs["x"][2] == 4
    assert all(isinstance(size, str) for size in graph.traced.inputs["x"][:2])
    for shape in ((1, 1, 4), (2, 5, 4), (3, 8, 4), (7, 2, 4)):
        tools.equal(graph, torch.randn(shape))


def test_what_depends_on_the_integers_themselves_is_fixed(tools, library):
    graph = tools.graph(Calls(lambda x, y: library.grouped(x, 3)), torch.randn(2, 6, 4))
    assert graph.traced.inputs["x"][1] == 6
    tools.equal(graph, torch.randn(2, 6, 4))


def test_nobody_else_is_told_primes(tools, library):
    seen = []

    def own(x, y):
        found = library.numbered(x)
        seen.extend(size for size in (*x.shape, *found.shape) if type(size) is int)
        return found

    tools.equal(tools.graph(Calls(own), torch.randn(2, 5, 4)), torch.randn(3, 7, 4))
    assert max(seen) < 100
