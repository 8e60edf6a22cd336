"""Models that give something else at every call are refused; those that only could are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.tracing.trace import trace


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x + torch.randn_like(x), "aten.randn_like.default"),
        (lambda x: F.dropout(x, 0.5, training=True), "aten.native_dropout.default"),
        (lambda x: torch.bernoulli(x.sigmoid()), "aten.bernoulli.default"),
        (lambda x: x + torch.rand(x.shape), "aten.rand.default"),
    ],
)
def test_random_numbers(tools, function, operator):
    with pytest.raises(NotExportableError) as caught:
        trace(tools.subject(Calls(function), torch.randn(20, 30)))
    said = str(caught.value)
    assert f"Calls gives other outputs at every call: {operator} draws random numbers" in said
    assert f"where: {__file__}:{function.__code__.co_firstlineno}\n" in said
    assert "F.dropout(x, p, training=self.training)" in said


def test_state_in_an_attribute_starts_anew_each_time(tools):
    class Remembers(nn.Module):
        state = torch.zeros(3)

        def forward(self, x):
            self.state = self.state + x.sum(0)
            return self.state

    subject = tools.subject(Remembers(), torch.ones(2, 3))
    trace(subject)
    assert subject.changed == {"attribute state"}


def test_state_that_nobody_can_put_back(tools):
    seen = []

    def counting(x):
        seen.append(len(x))
        return x + len(seen)

    with pytest.raises(NotExportableError, match="gives other outputs at every call, and not by random"):
        trace(tools.subject(Calls(counting), torch.ones(2, 3)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: torch.log(-x.abs()),  # NaN is equal to itself here
        lambda x: x + 0 * torch.randn_like(x),
    ],
)
def test_what_is_only_suspicious_passes(tools, function):
    assert trace(tools.subject(Calls(function), torch.randn(2, 3, 4, 5))).outputs == ("output",)
