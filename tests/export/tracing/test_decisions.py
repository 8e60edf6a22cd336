"""Decisions that depend on values, each compared with the model on inputs that take each way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export import trace
from moe_export.export.tracing import decisions


class Decides(nn.Module):
    """One module, the decision given as a function of the module and its input."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.how(self, x)


def if_else(self, x):
    if x.max() > 1:
        y = self.a(x)
        y = y.tanh()
    else:
        y = self.b(x)
    return y.relu()


def nested(self, x):
    if x.max() > 1:
        if x.min() < -1:
            return self.a(x)
        y = x * 2
    elif x.sum() > 0:
        y = self.b(x)
    else:
        y = x
    return y + 1 if x.mean() > 0 else y - 1


def and_or(self, x):
    if x.max() > 1 and not x.min() < -1:
        x = self.a(x)
    return self.b(x) if x.max() > 2 or x.min() < -2 else x


def twice(self, x):
    large = x.max() > 1
    if large:
        x = self.a(x)
    y = x + 1
    return self.b(y) if large else y


def in_place(self, x):
    y = torch.zeros_like(x)
    flag = x.max() > 1
    if flag:
        y[:, 0] += 3
        flag.logical_not_()
    else:
        y -= x
    return y + x


def asked_of_rows(self, x):
    if (x[:, 0] > 0).any():
        x = self.a(x)
    return x + 1


def undefined_there(self, x):
    if x.min() > 0:
        return x.log()
    return x.exp()


def switched(self, x):
    if self.a.in_features == 4 and x.max() > 1:
        x = self.a(x)
    return x


RIGHT = [if_else, nested, and_or, twice, in_place, asked_of_rows, undefined_there, switched]


def inputs():
    """Of both signs, large and small, of one row and of several: every way of every decision here is taken."""
    torch.manual_seed(1)
    x = torch.randn(5, 4)
    return [
        x,
        -x,
        x.abs() + 1.5,
        -x.abs() - 1.5,
        x / 10,
        x.abs() / 10,
        0 * x,
        100 * x,
        x[:1],
        x[:1] * 3,
        x[:2] - 1,
    ]


@pytest.mark.parametrize("how", RIGHT, ids=lambda how: how.__name__)
@pytest.mark.slow_but_one
def test_each_way_is_the_models(tools, how):
    graph = tools.graph(Decides(how), torch.randn(5, 4))
    assert any("decision on values at test_decisions.py:" in note for note in graph.notes)
    assert graph.traced.inputs["x"][0] == "batch"
    for x in inputs():
        tools.equal(graph, x)


def ends(self, x):
    if x.max() > 50:
        y = x * 2
        raise ValueError(f"too large: {y.shape}")
    if x.min() < -50:
        y = x - 1
        raise ValueError(f"too small: {y.shape}")
    return self.a(x)


def test_a_way_that_ends_the_model_is_a_check(tools):
    graph = tools.graph(Decides(ends), torch.rand(5, 4))
    assert sum("is taken as passed" in note for note in graph.notes) == 2
    tools.equal(graph, torch.randn(3, 4))


def caught(self, x):
    try:
        if x.min() < 0:
            raise ValueError("negative")
    except ValueError:
        return x.relu()
    return self.a(x)


def test_an_error_that_the_model_catches_is_a_way_like_another(tools):
    graph = tools.graph(Decides(caught), torch.rand(5, 4))
    for x in inputs():
        tools.equal(graph, x)


def known(self, x):
    n = x.new_zeros(x.shape[0], 3)
    if torch.all(n == 0):
        x = self.a(x)
    if self.scale.max() > 3:
        x = x * 100
    m = torch.zeros(4)
    m[0] = 9
    if m.sum() > 5:  # written to: asked as the graph runs
        x = x * 10
    return x


class ByLength(nn.Module):
    """Asks a tensor how long the input is: one answer at small sizes, another beyond them."""

    def forward(self, x):
        if x.new_ones(x.shape[1]).sum() > 20:
            return 3 * x
        return x


def test_what_the_sizes_decide_is_a_decision(tools):
    traced = trace(tools.subject(ByLength(), torch.randn(2, 5)))
    assert len(traced.decisions) == 1
    run = traced.program.module()
    for length in (1, 5, 19, 20, 21, 22, 300):
        x = torch.randn(3, length)
        torch.testing.assert_close(run(x)[0], ByLength()(x))


def test_what_no_input_has_a_say_in_is_no_decision(tools):
    graph = tools.graph(Decides(known), torch.rand(5, 4))
    assert len(graph.traced.decisions) == 1
    tools.equal(graph, torch.randn(3, 4))


def other_shape(self, x):
    return x[:, :2] if x.max() > 1 else x


def other_type(self, x):
    return x.double() if x.max() > 1 else x


def more_outputs(self, x):
    return (x, x + 1) if x.max() > 1 else (x,)


def other_number(self, x):
    return (x, 1) if x.max() > 1 else (x, 2)


def into_input(self, x):
    if x.max() > 1:
        x[:, 0] = 0
    return x + 1


def many(self, x):
    y = torch.zeros_like(x)
    for column in range(4):
        if x[0, column] > 0:
            y[:, column] = 1
    return y


REFUSED = {
    other_shape: "of shape",
    other_type: "float64 one way, torch.float32 the other",
    more_outputs: "the other",
    other_number: "no tensor, and not the same both ways",
    into_input: "writes into an input",
    many: "more than 8 ways",
}


@pytest.mark.parametrize("how", REFUSED, ids=lambda how: how.__name__)
def test_what_cannot_be_merged_is_refused_with_its_line(tools, how, monkeypatch):
    monkeypatch.setattr(decisions, "MOST_WAYS", 8)
    with pytest.raises(NotExportableError, match=REFUSED[how]) as refusal:
        trace(tools.subject(Decides(how), torch.rand(5, 4)))
    assert "test_decisions.py:" in refusal.value.where


def test_a_model_that_decides_nothing_is_traced_as_if_nothing_were_here(tools, monkeypatch):
    monkeypatch.setattr(decisions, "_Walk", None)
    assert not trace(tools.subject(nn.Linear(4, 4), torch.rand(5, 4))).decisions


def by_mask(self, x):
    y = self.a(x)
    if torch.isnan(y).any():
        print("NaN")
        y[torch.isnan(y)] = 0
    mask = y > 1
    if torch.any(mask):
        y[mask] = -0.5 * self.scale
    if bool((y < -1).any()):
        y[y < -1] += 2
    return y


def by_another_mask(self, x):
    y = self.a(x)
    if (y > 1).any():
        y[y < 0] = 0
    if (y > 1).any():
        y[y > 1] = self.b(y)[y > 1]
    else:
        y = y + 1
    return y


def takes(self, x):
    layers, scales = iter([self.a, self.b]), [2.0, 3.0]
    if x.sum() > 0:
        y = next(layers)(x)
        y = y * scales.pop()
    else:
        y = x
    return next(layers)(y) * scales.pop()


def test_a_side_that_takes_from_an_iterator_leaves_it_to_the_other(tools):
    module = Decides(takes).eval()
    traced = trace(tools.subject(module, torch.randn(3, 4)))
    for x in (torch.ones(2, 4), -torch.ones(5, 4)):
        with torch.no_grad():
            (found,) = traced.program.module()(x)
            torch.testing.assert_close(found, module(x))


@pytest.mark.parametrize(("how", "count"), [(by_mask, 0), (by_another_mask, 2)])
def test_a_write_by_the_mask_that_is_asked_for_is_no_decision(tools, how, count):
    module = Decides(how).eval()
    traced = trace(tools.subject(module, torch.randn(3, 4)))
    assert len(traced.decisions) == count
    for x in (torch.randn(5, 4), torch.zeros(2, 4), torch.randn(4, 4) * 10, torch.full((1, 4), torch.nan)):
        with torch.no_grad():
            (found,) = traced.program.module()(x)
            torch.testing.assert_close(found, module(x), equal_nan=True)
