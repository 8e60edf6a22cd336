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
from moe_export.export.dims import DimRequest
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.subject import Subject, make_subject

D = 3


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


def test_a_length_whose_loop_stays_as_it_is_is_fixed_and_said_to_be() -> None:
    subject = subject_of(Strange())
    (graph,) = export_subject(subject, Options(gates=False, simplify=False))
    assert [shape[1] for shape in graph.traced.inputs.values()] == ["seq", 5]
    assert sum("target: length 5 is fixed" in note for note in graph.notes) == 1
    check(subject, graph, ((6, 5), (1, 5), (23, 5)))


def test_such_a_length_that_was_asked_for_is_an_error() -> None:
    dims = DimRequest(picked={("target", 1): "steps"})
    with pytest.raises(NotExportableError, match="dimension 1 of target cannot be dynamic: it is fixed at 5"):
        export_subject(subject_of(Strange()), Options(gates=False, simplify=False, dims=dims))
