"""Branches whose sides are merged where they stand: in loops, in functions, nested, and those that must not be."""

# ruff: noqa: SIM108  statements and expressions are converted in different ways

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_export.export.tracing import decisions
from moe_export.export.tracing.branch_code import converted


class Steps(nn.Module):
    """A loop over time around one step, which decides."""

    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.step, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), step, 0

    def forward(self, x):
        h, n = x.new_zeros(x.shape[0], 4), x.new_zeros(x.shape[0], 4)
        ys = []
        for t in range(x.shape[1]):
            h, n = self.step(self, x[:, t], h, n)
            ys.append(h)
        return torch.stack(ys, 1)


def first_state(self, x, h, n):
    if torch.all(n == 0.0):
        m = x
    else:
        m = torch.maximum(x, h)
    return m.tanh(), n + x.abs()


def early(self, x, h, n):
    if x.max() > 1:
        return self.a(x).tanh(), n
    elif (h > 0).any() and not x.min() < -1:
        h = h * 0.5
        return h + x, n
    gain = x.mean()
    return self.b(h) * gain, n


def nested(self, x, h, n):
    if x.max() > 1:
        kept = h
        if h.sum() > 0:
            kept = kept * 0.5
            extra = kept + 1
            kept = kept * extra
    else:
        kept = torch.zeros_like(h)
        for shift in range(2):
            kept = kept + shift * x
    return (kept + x if x.min() < 0 or kept.max() > 2 else x).tanh(), n


@pytest.mark.parametrize(
    "step",
    [
        first_state,
        pytest.param(early, marks=pytest.mark.slow),
        pytest.param(nested, marks=pytest.mark.slow),
    ],
    ids=lambda step: step.__name__,
)
@pytest.mark.slow
def test_a_decision_in_each_step_is_folded_with_the_loop(tools, step, monkeypatch):
    monkeypatch.setattr(decisions, "MOST_WAYS", 1)
    graph = tools.graph(Steps(step), torch.randn(2, 6, 4))
    assert graph.traced.inputs["x"] == ("batch", "sequence", 4)
    assert any(node.op_type == "Scan" for node in graph.model.graph)
    assert any("decision on values at test_both_sides.py:" in note for note in graph.notes)
    torch.manual_seed(1)
    for x in (torch.randn(3, 11, 4), -torch.rand(1, 4, 4), 3 * torch.rand(2, 5, 4), torch.zeros(2, 3, 4)):
        tools.equal(graph, x)


class Once(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.how, self.calls, self.seen = nn.Linear(4, 4), how, 0, []

    def forward(self, x):
        return self.how(self, x)

    def counted(self, x):
        self.calls += 1
        return x * self.calls


def writes_before(self, x):
    y = x * 2
    if x.max() > 1:
        y += 1
    return y


def writes_a_part(self, x):
    y = torch.zeros_like(x)
    if x.max() > 1:
        z = y[:, 0]
        z += 3
        y = y + 1
    return y


def writes_its_own(self, x):
    if x.max() > 1:
        y = x * 2
        y += 1
    else:
        y = x
    return y


def counts(self, x):
    if x.max() > 1:
        y = self.counted(x)
    else:
        y = self.counted(x) * self.calls
    return y


def other_shapes(self, x):
    if x.max() > 1:
        y = x.mean(1)
    else:
        y = x[:, :2]
    return y.reshape(x.shape[0], -1).sum(1)


def other_numbers(self, x):
    if x.max() > 1:
        k, name = 2, "a"
    else:
        k, name = 3, "a"
    return x[:, :k].sum(1) + len(name)


def fails_there(self, x):
    size = 4 if x.max() > 1 else 8
    if x.min() < -50:
        y = x @ torch.zeros(7, 7)
    else:
        y = x * size
    return y


def infinite_there(self, x):
    if x.min() > 0:
        y = x.log() / x.mean()
    else:
        y = x - x
    return y


RIGHT = [writes_before, writes_a_part, writes_its_own, counts, other_shapes, other_numbers, infinite_there]


@pytest.mark.parametrize("how", RIGHT, ids=lambda how: how.__name__)
@pytest.mark.slow_but_one
def test_a_side_is_not_seen_where_it_is_not_taken(tools, how):
    graph = tools.graph(Once(how), torch.randn(5, 4))
    torch.manual_seed(1)
    x = torch.randn(3, 4)
    for each in (x, -x, x.abs() + 1.5, x.abs() / 10, 0 * x, 100 * x, x[:1]):
        tools.equal(graph, each)


def test_functions_are_as_they_were_after_a_trace(tools):
    before = first_state.__code__
    tools.graph(Once(writes_its_own), torch.randn(5, 4))
    assert first_state.__code__ is before
    assert not [name for name in globals() if name.startswith("_moe_export")]


SOURCE = """
def f(self, x, ys):
    if x.a: ys.append(x)
    if x.b: self.y = x
    if x.c: ys[0] = x
    for y in ys:
        if x.d: break
    if x.e:
        for y in ys: return y
    with x:
        if x.f: return x
    if x.g: global z; z = 1
    if x.h: y = super().f() if x.i else x
    y = super().f() if x.j else x
    y = x.k if x.l else (w := x)
    while x.m: y = x
    if x.n: y = x
    return y if x.o else x


def g(x):
    if x.q:
        yield x
        return
    yield y
"""


def test_only_what_gives_values_to_local_names_is_converted(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    lines = SOURCE.splitlines()
    found = {lines[line - 1].strip() for line in converted(str(path)).lines}
    assert found == {
        "if x.h: y = super().f() if x.i else x",
        "while x.m: y = x",
        "if x.n: y = x",
        "return y if x.o else x",
    }
