"""Scans that are given their operator: each way that libraries have is known for what it is, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import tree_scans as ways
from torch import Tensor
from tree_scans import linear, tree_scan

from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.recurrence.operator_scans import as_loop, scan_call, way_of
from moe_export.export.recurrence.user_scans import scans_step_by_step

LENGTHS = (1, 2, 7, 16, 63, 257)


def pairs(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.rand(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def vmapped(operator: Any, elements: Any, dim: int) -> Any:
    """A scan whose operator never sees the axis."""
    return tree_scan(torch.vmap(operator, in_dims=dim, out_dims=dim), elements, dim)


def no_scan(operator: Any, elements: Any) -> Any:
    """Like a scan up to its fourth element."""
    found = tree_scan(operator, elements)
    return [torch.cat([each[:4], each[4:] * 2]) for each in found]


def without_axis(one: Any, other: Any) -> Any:
    return one[0] @ other[0], one[0] @ other[1] + one[1]


@pytest.mark.parametrize(
    ("args", "kwargs", "axis", "backwards"),
    [
        ((linear, pairs(5, 3)), {}, 0, False),
        ((linear, list(pairs(2, 5, 3))), {"axis": 1}, 1, False),
        ((linear, pairs(2, 5, 3), 1, True), {}, 1, True),
        ((linear, pairs(2, 3, 5), -1), {}, 2, False),
    ],
)
def test_it_is_known_and_its_loop_computes_the_same(
    args: Any, kwargs: Any, axis: int, backwards: bool
) -> None:
    call = scan_call(tree_scan, args, kwargs)
    assert call is not None
    way = way_of(call)
    assert way is not None
    assert (way.axes, way.backwards) == ((axis, axis), backwards)
    wanted, found = tree_scan(*args, **kwargs), as_loop(call, way)
    assert type(found) is type(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_operator_may_be_given_elements_without_the_axis() -> None:
    elements = (torch.randn(4, 3, 3), torch.randn(4, 3, 1))

    def operator(one: Any, other: Any) -> Any:
        assert one[0].ndim == 2
        return without_axis(other, one)

    call = scan_call(vmapped, (operator, elements, 0), {})
    assert call is not None
    way = way_of(call)
    assert way is not None
    assert way.alone
    state = elements[1][0]
    for step in range(1, 4):
        state = elements[0][step] @ state + elements[1][step]
    torch.testing.assert_close(as_loop(call, way)[1][-1], state)


def test_elements_may_differ_in_rank_with_time_counted_from_the_back() -> None:
    decay, added = torch.rand(4, 1), torch.randn(2, 4, 3)
    same = scan_call(tree_scan, (lambda a, b: (a[0] * b[0], a[1] + b[1]), (decay, added)), {"axis": -2})
    assert same is not None
    found = way_of(same)
    assert found is not None
    assert found.axes == (0, 1)
    torch.testing.assert_close(as_loop(same, found)[0], decay.cumprod(0))


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (tree_scan, lambda one, other: (one[0] - other[0], one[1])),  # not associative
        (no_scan, linear),
        (lambda function, elements: function(elements, elements), linear),
        (lambda function, elements: elements, linear),
    ],
)
def test_what_is_no_scan_is_left_alone(function: Any, operator: Any) -> None:
    call = scan_call(function, (operator, pairs(5, 3)), {})
    assert call is not None
    assert way_of(call) is None


@pytest.mark.parametrize(
    "args", [(linear,), (linear, "text"), (pairs(2, 3),), (linear, pairs(2, 3), torch.ones(2)), (linear, ())]
)
def test_what_is_no_such_call(args: Any) -> None:
    assert scan_call(tree_scan, args, {}) is None


def test_an_empty_sequence() -> None:
    call = scan_call(tree_scan, (linear, pairs(5, 3)), {})
    assert call is not None
    way = way_of(call)
    assert way is not None
    empty = scan_call(tree_scan, (linear, pairs(0, 3)), {})
    assert empty is not None
    assert [each.shape for each in as_loop(empty, way)] == [(0, 3), (0, 3)]


def test_functions_are_replaced_under_their_names_and_put_back() -> None:
    before = dict(vars(ways))
    decay, added = torch.rand(2, 5, 3), torch.rand(2, 5, 3)
    with scans_step_by_step(ways.Gated(ways.forwards)):
        assert ways.tree_scan is not before["tree_scan"]
        torch.testing.assert_close(ways.forwards(decay, added), ways.step_by_step(decay, added))
    assert vars(ways) == before


@pytest.mark.parametrize(
    "run",
    [
        ways.forwards,
        pytest.param(ways.backwards, marks=pytest.mark.slow),
        pytest.param(ways.running_maximum, marks=pytest.mark.slow),
        pytest.param(ways.passes, marks=pytest.mark.slow),
    ],
)
def test_it_becomes_one_scan_for_any_length(run: Any) -> None:
    torch.manual_seed(0)
    module = ways.Gated(run).eval()
    subject = make_subject(module, (torch.randn(2, 6, 12),), {}, source=Path(ways.__file__), how="a test")
    graph = export_subject(subject, Options(gates=False, recurrence="scan"))[0]
    assert [node.op_type for node in graph.model.graph].count("Scan") == 1
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())
    for length in LENGTHS:
        x = torch.randn(3, length, 12)
        with torch.no_grad():
            wanted = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], wanted, rtol=1e-4, atol=1e-5)


def test_functions_called_within_vmap_are_tried_there_too() -> None:
    """Random numbers of PyTorch are refused there."""
    decay, added = torch.rand(2, 5, 3), torch.rand(2, 5, 3)
    wanted = torch.vmap(lambda a, x: ways.tree_scan(linear, (a, x))[1])(decay, added)
    plain = torch.vmap(ways.doubling)(decay[None], added[None])[0]
    with scans_step_by_step(ways.Gated(ways.forwards)):
        assert torch.vmap(lambda a, x: ways.tree_scan(linear, (a, x))[1])(decay, added).allclose(wanted)
        assert torch.vmap(ways.doubling)(decay[None], added[None])[0].allclose(plain)
