"""Modules that are looked up by a number of the data: all are computed, and the right one's result is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import only
from torch import Tensor, nn

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.options import Options
from moe_export.export.pipeline import export_subject
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.trace import trace

E, K, D = 3, 2, 4


def items(self: Experts, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.size(0)):
        for j in range(K):
            out[i] += weights[i, j] * self.experts[indices[i, j].item()](x[i])
    return out


def tensors(self: Experts, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    rows = []
    for row, gates, chosen in zip(x, weights, indices, strict=True):
        rows.append(sum(gate * self.experts[e](row) for gate, e in zip(gates, chosen, strict=True)))
    return torch.stack(rows)


def lists(self: Experts, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    results = [
        torch.stack([self.experts[e](x[i]) for i, e in enumerate(indices[:, j].tolist())]) for j in range(K)
    ]
    return sum(weights[:, j : j + 1] * result for j, result in enumerate(results))


def parts(self: Experts, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Of each expert, its weights and a module inside; and the expert before it, the last for the first."""
    rows = []
    for i in range(x.size(0)):
        e = int(indices[i, 0])
        expert, before = self.experts[e], self.experts[e - 1]
        rows.append(torch.relu(expert[0](x[i])) @ before[0].weight + expert[0].bias)
    return torch.stack(rows)


class Experts(nn.Module):
    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.router, self.way = nn.Linear(D, E), way
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.router(x).softmax(-1).topk(K, dim=-1)
        return self.way(self, x, weights, indices)


WAYS = {way.__name__: way for way in (items, tensors, lists, parts)}


def subject_of(module: nn.Module, x: Tensor) -> Subject:
    return make_subject(module, (x,), {}, source=Path(__file__), how="a test")


def test_a_sequence_of_modules_is_looked_up_in_too() -> None:
    torch.manual_seed(0)
    module = Experts(tensors)
    module.experts = nn.Sequential(*module.experts)
    traced = trace(subject_of(module, torch.randn(3, D)), DimRequest(True, {}), as_called=True)
    x = torch.randn(3, D) * 3
    torch.testing.assert_close(traced.program.module()(x)[0], module(x))


@pytest.mark.parametrize("name", WAYS)
def test_the_trace_takes_the_one_that_the_data_names(name: str) -> None:
    torch.manual_seed(0)
    module = Experts(WAYS[name])
    traced = trace(subject_of(module, torch.randn(3, D)), DimRequest(True, {}), as_called=True)
    assert traced.lookups
    assert all("test_looked_up.py:" in place for place in traced.lookups)
    for _ in range(4):  # rows that the trace never saw, and other experts
        x = torch.randn(3, D) * 3
        (found,) = traced.program.module()(x)
        torch.testing.assert_close(found, module(x))


@pytest.mark.parametrize("name", only(["items"], WAYS))
@pytest.mark.slow_but_one
def test_it_is_right_for_any_number_of_rows(name: str) -> None:
    torch.manual_seed(0)
    module = Experts(WAYS[name])
    graph = export_subject(subject_of(module, torch.randn(6, D)), Options(gates=False, simplify=False))[0]
    assert graph.traced.inputs["x"] == ("batch", D)
    all_run = any("all modules that are looked up at test_looked_up.py:" in note for note in graph.notes)
    scans = [node for node in graph.model.graph if node.op_type == "Scan"]
    if name == "parts":  # what is looked up is weights, too
        assert all_run
        assert scans
    else:
        assert any("3 experts at " in note and "lowered as" in note for note in graph.notes)
        assert not all_run
        assert not scans
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())
    for rows in (1, 2, 5, 17):
        x = torch.randn(rows, D)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, module(x).detach().numpy(), rtol=1e-5, atol=1e-6)


class Stacked(nn.Module):
    """Matrices and results of a stack, by a number or by a tensor ()."""

    def __init__(self, by_item: bool) -> None:
        super().__init__()
        self.router, self.by_item = nn.Linear(D, E), by_item
        self.weights = nn.Parameter(torch.randn(D, E, D))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        rows = []
        for i in range(x.size(0)):
            e = chosen[i].item() if self.by_item else chosen[i]
            both = torch.stack([x[i], -x[i], x[i] * 2])
            rows.append(both[e - 1] @ self.weights[:, e])
        return torch.stack(rows)


@pytest.mark.parametrize("by_item", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_entries_of_a_stack_are_looked_up_for_any_number_of_rows(by_item: bool) -> None:
    torch.manual_seed(0)
    module = Stacked(by_item)
    graph = export_subject(subject_of(module, torch.randn(6, D)), Options(gates=False, simplify=False))[0]
    assert graph.traced.inputs["x"] == ("batch", D)
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())
    for rows in (1, 2, 5, 17):
        x = torch.randn(rows, D)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, module(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def sums(self: Experts, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """For experts that give one tensor or several, of any shape and type."""
    rows = []
    for i in range(x.size(0)):
        made = self.experts[indices[i, 0]](x[i])
        first = made[0] if isinstance(made, tuple) else made
        rows.append(first.sum().float() * weights[i, 0])
    return torch.stack(rows)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (Pair(), "results of different kinds"),
        (nn.Unflatten(0, (2, 2)), "tensors of different types or shapes"),
        (nn.Linear(D, D - 1), "tensors of different types or shapes"),
        (Wide(), "tensors of different types or shapes"),
    ],
    ids=["pair", "axes", "size", "type"],
)
def test_modules_that_give_different_things_are_refused(last: nn.Module, reason: str) -> None:
    module = Experts(sums)
    module.experts[-1] = last
    with pytest.raises(NotExportableError, match=reason) as caught:
        trace(subject_of(module, torch.randn(3, D)), DimRequest(True, {}), as_called=True)
    assert caught.value.code is Code.VALUES_DECIDE
    assert "test_looked_up.py:" in str(caught.value)


def test_numbers_that_python_knows_are_as_they_were() -> None:
    class Known(Experts):
        def forward(self, x: Tensor) -> Tensor:
            return self.experts[1](x) + self.experts[-1](x) + self.experts[:2][0](x)

    module = Known(items)
    traced = trace(subject_of(module, torch.randn(3, D)), DimRequest(True, {}), as_called=True)
    assert not traced.lookups
    assert sum(node.target is torch.ops.aten.tanh.default for node in traced.program.graph.nodes) == 3
