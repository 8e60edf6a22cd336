"""The axes that operators name: entries along the others are computed apart from each other, and alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moe_export.export.axes.operators import ADDS_AN_AXIS, ALONG
from moe_export.export.axes.shapes import named_axes, with_one_lead

_aten = torch.ops.aten
SHAPE = (2, 3, 4, 6)  # values of this shape; the axes that are named are the last two

USES: dict[Any, list[tuple[Any, ...]]] = {
    _aten.softmax.int: [(-1,), (2,)],
    _aten._softmax.default: [(-1, False)],
    _aten.log_softmax.int: [(3,)],
    _aten._log_softmax.default: [(2, False)],
    _aten.sum.dim_IntList: [([-1],), ([2, 3], True)],
    _aten.mean.dim: [([-1, -2],), ([2], True)],
    _aten.amax.default: [([3],)],
    _aten.amin.default: [([-2], True)],
    _aten.any.dim: [(-1,)],
    _aten.any.dims: [([2, -1],)],
    _aten.all.dim: [(-2, True)],
    _aten.prod.dim_int: [(3,)],
    _aten.logsumexp.default: [([-1],)],
    _aten.var.correction: [([2],)],
    _aten.linalg_vector_norm.default: [(2, [-1])],
    _aten.count_nonzero.dim_IntList: [([3],)],
    _aten.cumsum.default: [(-1,)],
    _aten.cumprod.default: [(2,)],
    _aten.logcumsumexp.default: [(-2,)],
    _aten.split.Tensor: [(2, -1), (4, 3)],
    _aten.split_with_sizes.default: [([1, 3], 2)],
    _aten.chunk.default: [(3, -1)],
    _aten.unbind.int: [(-1,), (2,)],
    _aten.topk.default: [(2,), (1, 2)],
    _aten.glu.default: [(), (2,)],
    _aten.select.int: [(-1, 2)],
    _aten.slice.Tensor: [(3, 1, 5, 2)],
    _aten.unsqueeze.default: [(-1,), (3,)],
    _aten.squeeze.dim: [(-1,)],
    _aten.transpose.int: [(2, -1)],
    _aten.permute.default: [([0, 1, 3, 2],)],
    _aten.cat.default: [(-1,), (2,)],
    _aten.concat.default: [(3,)],
    _aten.stack.default: [(-1,), (2,)],
}
"""What each operator is given behind a value, or several values."""


def traced(target: Any, args: tuple[Any, ...], value: Tensor) -> fx.Node:
    """The operator's node in a trace."""
    given = [value, value + 1] if "Tensor[]" in str(target._schema).partition("->")[0] else value

    def program(given: Any) -> Any:
        return target(given, *args)

    graph = make_fx(program, tracing_mode="fake", pre_dispatch=True)(given).graph
    (node,) = [node for node in graph.nodes if node.target is target]
    return node


def results(target: Any, args: Any, value: Tensor, kwargs: Any = None) -> tuple[Tensor, ...]:
    several = "Tensor[]" in str(target._schema).partition("->")[0]
    found = target([value, value + 1] if several else value, *args, **(kwargs or {}))
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def cases() -> list[Any]:
    return [
        pytest.param(target, args, id=f"{target}{args}")
        for target, several in USES.items()
        for args in several
    ]


def test_every_operator_has_a_case():
    assert set(USES) == ALONG


@pytest.mark.parametrize(("target", "args"), cases())
def test_entries_of_other_axes_are_computed_apart(target: Any, args: tuple[Any, ...]):
    value = torch.randn(SHAPE, dtype=torch.float64)
    axes = named_axes(traced(target, args, value))
    assert axes
    assert min(axes) >= 2 or target is _aten.permute.default
    order = torch.tensor([2, 0, 1])
    mine = results(target, args, value[:, order])
    for one, other in zip(mine, results(target, args, value), strict=True):
        torch.testing.assert_close(one, other[:, order])


@pytest.mark.parametrize("lead", [0, 1, 2])
@pytest.mark.parametrize(("target", "args"), cases())
def test_several_leading_axes_become_one(target: Any, args: tuple[Any, ...], lead: int):
    value = torch.randn(SHAPE, dtype=torch.float64)
    merged = value.reshape(-1, *SHAPE[lead:])  # 1, 2 or 6 rows in front
    rank = len(SHAPE) + (target in ADDS_AN_AXIS)
    found = with_one_lead(target, (value, *args), {}, rank, lead)
    assert found is not None
    for one, other in zip(
        results(target, found[0][1:], merged, found[1]), results(target, args, value), strict=True
    ):
        torch.testing.assert_close(one, other.reshape(one.shape))


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (_aten.sum.dim_IntList, ([1, 3],)),
        (_aten.sum.dim_IntList, ([],)),
        (_aten.sum.dim_IntList, (None,)),
        (_aten.argmax.default, ()),
        (_aten.permute.default, ([1, 0, 2, 3],)),
        (_aten.permute.default, ([0, 2, 1, 3],)),
        (_aten.transpose.int, (1, 2)),
        (_aten.cat.default, ()),
        (_aten.unsqueeze.default, (1,)),
        (_aten.softmax.int, (-3,)),
    ],
)
def test_an_operator_along_the_leading_axes_has_no_such_form(target: Any, args: tuple[Any, ...]):
    rank = len(SHAPE) + (target in ADDS_AN_AXIS)
    assert with_one_lead(target, (torch.zeros(SHAPE), *args), {}, rank, 2) is None


def named(program: Callable[..., Any], *given: Tensor) -> tuple[int, ...]:
    graph = make_fx(program, tracing_mode="fake", pre_dispatch=True)(*given).graph
    return named_axes(next(node for node in graph.nodes if node.op == "call_function"))


def test_axes_that_are_left_open_are_all():
    value = torch.zeros(SHAPE)
    assert named(lambda x: x.amax(), value) == (0, 1, 2, 3)
    assert named(lambda x: x.argmax(), value) == (0, 1, 2, 3)
    assert named(lambda x: x.norm(dim=None), torch.zeros(3)) == (0,)
    assert named(lambda x: _aten.sum.dim_IntList(x, None), value) == (0, 1, 2, 3)
    assert named(lambda x: x.sin(), value) == ()


def test_an_axis_of_the_result_is_counted_there():
    value, empty = torch.zeros(SHAPE), torch.zeros(0)
    assert named(lambda x: x.unsqueeze(-1), value) == (4,)
    assert named(lambda x: torch.stack([x, x], -1), value) == (4,)
    assert named(lambda x, nothing: torch.cat([nothing, x], -1), value, empty) == (3,)
    assert named(lambda x: x.sort(stable=True).values, value) == (3,)
    assert named(lambda x: x.sum(), torch.zeros(())) == ()
