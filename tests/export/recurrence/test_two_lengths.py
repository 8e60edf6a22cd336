"""A model that loops over two lengths, as an encoder and its decoder do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.tracing.dims import DimRequest

D = 3


class Translator(nn.Module):
    """Each step of the target looks at all states of the source."""

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        h, states = torch.zeros_like(source[:, 0]), []
        for t in range(source.shape[1]):
            h = torch.tanh(h + source[:, t])
            states.append(h)
        memory, found = torch.stack(states, 1), []
        for x in target.unbind(1):
            seen = torch.softmax((memory * h[:, None]).sum(-1), -1)
            h = torch.sigmoid(x + (seen[:, :, None] * memory).sum(1))
            found.append(h)
        return torch.stack(found, 1)


class Strange(nn.Module):
    """The sum of the source's states is where the target starts, whose steps read the value of half as many steps."""

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        h = torch.zeros_like(source[:, 0])
        for t in range(source.shape[1]):
            h = torch.tanh(h + source[:, t])
        states = [h]
        for t in range(target.shape[1]):
            states.append(torch.sigmoid(target[:, t] + states[t // 2]))
        return torch.stack(states, 1)


def subject_of(module: nn.Module) -> Subject:
    inputs = (torch.randn(2, 6, D), torch.randn(2, 5, D))
    return make_subject(module.eval(), inputs, {}, source=Path(__file__), how="a test")


def check(subject: Subject, graph: Graph, lengths: tuple[tuple[int, int], ...]) -> None:
    proto = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    for source, target in lengths:
        example = {"source": torch.randn(3, source, D), "target": torch.randn(3, target, D)}
        with torch.no_grad():
            (wanted,) = subject.call_named(example)
        found = session.run(None, {name: tensor.numpy() for name, tensor in example.items()})[0]
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_both_are_free_and_each_loop_is_a_scan() -> None:
    subject = subject_of(Translator())
    (graph,) = export_subject(subject, Options(gates=False, simplify=False))
    assert [shape[1] for shape in graph.traced.inputs.values()] == ["sequence", "target_sequence"]
    assert [node.op_type for node in graph.model.graph].count("Scan") == 2
    for place in ("source.shape[1]", "target.shape[1]"):
        assert sum(f"over {place}" in note for note in graph.notes) == 1
    check(subject, graph, ((6, 5), (1, 1), (1, 8), (9, 1), (23, 17), (4, 40)))


def test_there_is_no_one_step_of_two_loops() -> None:
    subject = subject_of(Translator())
    with pytest.raises(NotExportableError, match="loops over two lengths"):
        export_subject(subject, Options(gates=False, simplify=False, decode=True))


def test_a_length_whose_loop_stays_as_it_is_is_fixed_and_said_to_be() -> None:
    subject = subject_of(Strange())
    (graph,) = export_subject(subject, Options(gates=False, simplify=False))
    assert [shape[1] for shape in graph.traced.inputs.values()] == ["sequence", 5]
    (note,) = [note for note in graph.notes if "target: length 5 is fixed" in note]
    assert "step 3 reads step 1's value" in note
    check(subject, graph, ((6, 5), (1, 5), (23, 5)))


@pytest.mark.slow
def test_such_a_length_that_was_asked_for_is_an_error() -> None:
    dims = DimRequest(picked={("target", 1): "steps"})
    with pytest.raises(NotExportableError, match="dimension 1 of target cannot be dynamic: it is fixed at 5"):
        export_subject(subject_of(Strange()), Options(gates=False, simplify=False, dims=dims))


class Continued(torch.nn.Module):
    """A loop over a second length that begins where the one over the first ends, each through a cell of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.randn(3, 3) / 3) for _ in range(2))

    def forward(self, x, y):
        h = x.new_zeros(x.shape[0], 3)
        for t in range(x.shape[1]):
            h = 0.9 * h + x[:, t] @ self.first
        g, found = h, []
        for t in range(y.shape[1]):
            g = 0.9 * g + y[:, t] @ self.second
            found.append(g)
        return torch.stack(found, 1), g - h


@pytest.mark.slow
@torch.no_grad()
def test_a_loop_that_continues_another_is_right_or_its_length_is_said(tools):
    torch.manual_seed(0)
    module = Continued().eval()
    graph = tools.graph(module, torch.randn(2, 6, 3), torch.randn(2, 4, 3))
    free = graph.traced.inputs["y"][1] != 4
    for length in (4, 9) if free else (4,):
        tools.equal(graph, torch.randn(3, 5, 3), torch.randn(3, length, 3))
