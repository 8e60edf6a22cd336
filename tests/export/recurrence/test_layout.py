"""States whose longest axis is not the last are kept the other way round; everything else stays, and is right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import one_in, only, slow
from torch import Tensor, nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.tracing.dims import DimRequest

D, N, L = 12, 3, 5
WEIGHT = torch.linspace(-1, 1, D * N).reshape(D, N)
LIST = torch.linspace(0.1, 1, N)


class Loop(nn.Module):
    """h is (b, d, n); a way says what a step does with it, and what it hands out."""

    def __init__(self, step: Callable[..., tuple[Tensor, Tensor]], time: int = 1) -> None:
        super().__init__()
        self.A, self.mixing = nn.Parameter(-WEIGHT.abs()), nn.Parameter(LIST.diag() * 0.3)
        self.step, self.time = step, time

    def forward(self, x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[1 - self.time], D, N)
        ys = []
        for t in range(x.shape[self.time]):
            h, y = self.step(self, h, x.select(self.time, t), B.select(self.time, t))
            ys.append(y)
        return torch.stack(ys, self.time), h


def _decayed(m: Loop, h: Tensor, x: Tensor, B: Tensor) -> Tensor:
    return torch.exp(x.abs()[..., None] * m.A) * h + x[..., None] * B[:, None]


def _einsum(m, h, x, B):
    h = _decayed(m, h, x, B)
    return h, torch.einsum("bdn,bn->bd", h, B)


def _matmul(m, h, x, B):
    h = _decayed(m, h, x, B)
    return h, (h @ B[..., None]).squeeze(-1)


def _summed(m, h, x, B):
    h = _decayed(m, h, x, B)
    return h, (h * B[:, None]).sum(-1) + x


def _over_the_long_axis(m, h, x, B):
    h = _decayed(m, h, x, B)
    return h, (h * x[..., None]).sum(1)


def _a_list_of_weights(m, h, x, B):
    h = torch.tanh(h * m.mixing.diagonal() + B[:, None] + x[..., None])
    return h, h.mean(-1)


def _mixed(m, h, x, B):
    h = h @ m.mixing + x[..., None] * B[:, None]
    return h, torch.einsum("bdn,bn->bd", h, B)


def _normalised(m, h, x, B):
    h = _decayed(m, h, x, B)
    h = h / (1 + h.abs().amax(-1, keepdim=True))
    return h, torch.einsum("bdn,bn->bd", h, B)


WAYS = {
    each.__name__.strip("_"): each
    for each in (_einsum, _matmul, _summed, _over_the_long_axis, _a_list_of_weights, _mixed, _normalised)
}


def _handed_out(m, h, x, B):
    h = _decayed(m, h, x, B)
    return h, h


def _softmax(m, h, x, B):
    h = torch.softmax(_decayed(m, h, x, B), -1)
    return h, h.sum(1)


STAYS = {each.__name__.strip("_"): each for each in (_handed_out, _softmax)}


@functools.cache
def exported(step: Callable[..., tuple[Tensor, Tensor]], time: int = 1) -> tuple[Loop, Graph]:
    torch.manual_seed(0)
    module = Loop(step, time)
    shape = (2, L) if time == 1 else (L, 2)
    inputs = (torch.randn(*shape, D), torch.randn(*shape, N))
    subject = make_subject(module, inputs, {}, source=Path(__file__), how="a test")
    free = {(name, axis): size for name in subject.inputs for axis, size in ((1 - time, "b"), (time, "l"))}
    options = Options(dims=DimRequest(static=True, picked=free), gates=False, recurrence="scan")
    return module, export_subject(subject, options)[0]


def body_of(graph: Graph) -> ir.Graph:
    (scan,) = [node for node in graph.model.graph if node.op_type == "Scan"]
    return scan.attributes["body"].as_graph()


def check(module: Loop, graph: Graph, time: int = 1) -> None:
    proto = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    for length in (1, 2, 7, 64):
        for batch in (1, 3):
            shape = (batch, length) if time == 1 else (length, batch)
            x, B = torch.randn(*shape, D), torch.randn(*shape, N)
            with torch.no_grad():
                wanted = module(x, B)
            found = session.run(None, {"x": x.numpy(), "B": B.numpy()})
            for one, other in zip(wanted, found, strict=True):
                np.testing.assert_allclose(other, one.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("time", [slow(0), 1])
@pytest.mark.parametrize("name", only(["matmul", "summed"], WAYS))
def test_the_longest_axis_of_a_state_is_its_last(name: str, time: int) -> None:
    module, graph = exported(WAYS[name], time)
    body = body_of(graph)
    assert list(body.inputs[0].shape)[1:] == [N, D]
    assert not [node for node in body if node.op_type == "Transpose"]
    check(module, graph, time)


@pytest.mark.parametrize("name", one_in(2, STAYS))
def test_what_has_no_such_form_stays(name: str) -> None:
    module, graph = exported(STAYS[name])
    assert list(body_of(graph).inputs[0].shape)[1:] == [D, N]
    check(module, graph)


def test_nothing_is_left_of_the_loop_as_it_was() -> None:
    """Axes of size 1 are put into sequences, and dropped from results, outside the loop."""
    _, graph = exported(WAYS["matmul"], 1)
    kinds = [node.op_type for node in body_of(graph)]
    assert sorted(kinds) == ["Abs", "Add", "Exp", "MatMul", "Mul", "Mul", "Mul", "Unsqueeze"]
    assert [node.op_type for node in graph.model.graph].count("Scan") == 1
