"""Scans in passes become one Scan of any length; functions that are none are left alone; so is mambapy's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import user_scans as ways
from torch import nn

from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.recurrence.user_scans import scan, scans_step_by_step

LENGTHS = (1, 2, 7, 16, 63, 64, 257)


def exported(module: nn.Module, length: int, recurrence: str = "scan") -> tuple[Subject, Graph]:
    subject = make_subject(
        module.eval(), (torch.randn(2, length, 12),), {}, source=Path(ways.__file__), how="a test"
    )
    options = Options(gates=False, recurrence=recurrence)  # type: ignore[arg-type]
    return subject, export_subject(subject, options)[0]


def check(module: nn.Module, graph: Graph) -> None:
    proto = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    for length in LENGTHS:
        for batch in (1, 3):
            x = torch.randn(batch, length, 12)
            with torch.no_grad():
                wanted = module(x).numpy()
            np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], wanted, rtol=1e-4, atol=1e-5)


def scans(graph: Graph) -> list[ir.Node]:
    return [node for node in graph.model.graph if node.op_type == "Scan"]


@pytest.mark.parametrize(
    ("function", "time_first"),
    [
        pytest.param(ways.Doubling, False, marks=pytest.mark.slow),
        pytest.param(ways.AddedFirst, True, marks=pytest.mark.slow),
    ],
    ids=["doubling", "in place"],
)
def test_a_scan_in_passes_becomes_one_scan_for_any_length(function: type, time_first: bool) -> None:
    torch.manual_seed(0)
    module = ways.Block(function, time_first)
    _, graph = exported(module, 6)
    (found,) = scans(graph)
    body = found.attributes["body"].as_graph()
    assert [list(value.shape)[1:] for value in body.outputs] == [[4, 12], [1, 12]]  # no (l, d, n) is kept
    check(module, graph)
    other = exported(module, 11)[1]
    assert len(list(other.model.graph)) == len(list(graph.model.graph))


def test_another_function_of_two_tensors_is_itself() -> None:
    module = ways.Block(ways.NoScan)
    one, other = torch.randn(2, 5, 12, 4), torch.randn(2, 5, 12, 4)
    wanted = ways.NoScan.apply(one, other)
    with scans_step_by_step(nn.Identity()):
        assert torch.equal(ways.NoScan.apply(one, other), wanted)
    _, graph = exported(module, 6, "auto")
    assert not scans(graph)


def test_functions_are_themselves_afterwards() -> None:
    before = ways.Doubling.forward
    decay, added = torch.rand(2, 5, 3, 2), torch.rand(2, 5, 3, 2)
    with scans_step_by_step(nn.Identity()):
        assert ways.Doubling.forward is not before
        assert torch.allclose(ways.Doubling.apply(decay, added), scan(decay, added, 1))
    assert ways.Doubling.forward is before


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [True, False])
def test_mambapy(parallel: bool) -> None:
    mamba = pytest.importorskip("mambapy.mamba", reason="mambapy is not installed")
    torch.manual_seed(0)
    module = mamba.Mamba(mamba.MambaConfig(d_model=12, n_layers=2, d_state=4, pscan=parallel))
    _, graph = exported(module, 6)
    assert len(scans(graph)) == 2
    for found in scans(graph):
        assert [list(value.shape)[1:] for value in found.attributes["body"].as_graph().outputs] == [
            [4, 24],
            [1, 24],
        ]
    check(module, graph)
