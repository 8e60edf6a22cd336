"""A body run once for all iterations gives what it gives iteration by iteration, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from moe_export.export.recurrence.all_at_once import AllAtOnce, NotAlikeError, Rows, goes_at_once

N, D, E = 5, 4, 3


def lookup(x: Tensor, number: Tensor, w: Tensor) -> Tensor:
    """One of three results."""
    results = torch.stack([x.tanh(), F.linear(x, w), x * 2])
    return results.index_select(0, number.view(1)).squeeze(0)


def lookup_behind(x: Tensor, number: Tensor, w: Tensor) -> Tensor:
    """The same along the last axis, of a matrix."""
    results = torch.stack([x.unsqueeze(-1) * w, x.unsqueeze(0) + w, w.t() - x], -1)
    return results.index_select(-1, number.view(1).expand(2)).sum([0, 2])


def axes(x: Tensor, number: Tensor, w: Tensor) -> Tensor:
    """Axes from the front and from behind, and of values that have none."""
    matrix = x.view(2, 2).transpose(0, -1).softmax(-1)
    return torch.cat([matrix.permute(1, 0).reshape(4)[1:], (number * x[0]).unsqueeze(0), matrix.amax(0)])


def broadcasts(x: Tensor, number: Tensor, w: Tensor) -> Tensor:
    """Numbers, rows and matrices in one, with weights that all iterations share."""
    return torch.where(number > 0, w + x, x.unsqueeze(1) * number) - F.layer_norm(x, (D,), w[0], w[1])


def several(x: Tensor, number: Tensor, w: Tensor) -> Tensor:
    """Operators with several results."""
    values, places = F.linear(x, w).topk(2)
    left, right = x.split(2)
    return values + places + left * right


def by_default(x: Tensor, number: Tensor, w: Tensor) -> Tensor:
    """Axes that the code leaves out."""
    halves = F.glu(torch.cat([x, x + 1]))
    return halves.cumsum(0) + torch.stack([x, halves]).logsumexp(0) + torch.stack(x.unbind())


def body_of(function: Callable[..., Tensor]) -> tuple[fx.GraphModule, Tensor, Tensor, Tensor]:
    """The function of one iteration, as a graph; rows (N, D), numbers (N,), weights (D, D)."""
    torch.manual_seed(0)
    x, w = torch.randn(N, D, dtype=torch.float64), torch.randn(D, D, dtype=torch.float64)
    numbers = torch.tensor([0, 2, 1, 1, 2])
    return make_fx(function, pre_dispatch=True)(x[0], numbers[0], w), x, numbers, w


@pytest.mark.parametrize("function", [lookup, lookup_behind, axes, broadcasts, several, by_default])
def test_rows_are_those_of_each_iteration(function: Callable[..., Tensor]) -> None:
    body, x, numbers, w = body_of(function)
    found = AllAtOnce(body).run(Rows(x), Rows(numbers), w)
    expected = torch.stack([function(row, number, w) for row, number in zip(x, numbers, strict=True)])
    assert isinstance(found, Rows)
    torch.testing.assert_close(found.value, expected)


def shared(x: Tensor, number: Tensor, w: Tensor) -> Tensor:
    """A row of what all iterations share: of a stack of matrices, N of them would be copied."""
    return w.index_select(0, number.view(1)).squeeze(0)


def reversed_entries(x: Tensor, number: Tensor, w: Tensor) -> Tensor:
    return x.flip(0)


def all_axes(x: Tensor, number: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).sum([])


def joined(x: Tensor, number: Tensor, w: Tensor) -> Tensor:
    return torch.cat([x, w[0]])


@pytest.mark.parametrize("function", [shared, reversed_entries, all_axes, joined])
def test_a_body_that_has_no_rule_is_refused(function: Callable[..., Tensor]) -> None:
    body, x, numbers, w = body_of(function)
    with pytest.raises(NotAlikeError):
        AllAtOnce(body).run(Rows(x), Rows(numbers), w)


@pytest.mark.parametrize(
    ("function", "goes"), [(lookup, True), (shared, False), (broadcasts, False), (by_default, False)]
)
def test_only_lookups_of_results_go_at_once(function: Callable[..., Any], goes: bool) -> None:
    """What computes the same in each iteration may stay a loop, which needs less memory."""
    assert goes_at_once(body_of(function)[0].graph, 2) is goes


def test_what_computes_nothing_goes_at_once() -> None:
    assert goes_at_once(body_of(lambda x, number, w: x.view(2, 2)[0])[0].graph, 2)
