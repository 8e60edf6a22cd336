"""Tokens that keep their axes, (batch, time): the same experts as behind flat ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import unflattened
from slow_cases import only

from moe_export.comparing.checking import verify_graph
from moe_export.export import Options, export_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.verify import OnnxRuntimeRunner, Tolerance


def exported(tools, tmp_path, module, x):
    (graph,) = export_subject(tools.subject(module, x), Options(gates=False, simplify=False))
    write_model(graph.model, tmp_path / "model.onnx")
    return graph, OnnxRuntimeRunner(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "idiom",
    only([unflattened.Places, unflattened.SlotsOutside], unflattened.LINES),
    ids=lambda idiom: idiom.__name__,
)
def test_experts_are_seen_behind_tokens_of_two_axes(tools, tmp_path, idiom):
    module = idiom().eval()
    graph, runner = exported(tools, tmp_path, module, torch.randn(2, 5, unflattened.FEATURES))
    assert any("4 experts at" in note and "lowered as" in note for note in graph.notes), graph.notes
    for batch, time in ((1, 1), (3, 7), (7, 3), (1, 64)):
        x = torch.randn(batch, time, unflattened.FEATURES)
        with torch.no_grad():
            wanted = module(x).numpy()
        found = next(iter(runner.run({graph_input(runner): x.numpy()}).values()))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    report, _ = verify_graph(graph, tmp_path / "model.onnx", tolerance=Tolerance())
    assert report.verdict == "equal", report


def graph_input(runner):
    (spec,) = runner.inputs
    assert spec.shape[:2] == ("batch", "sequence")
    return spec.name


def test_what_is_no_part_of_the_experts_keeps_its_axes(tools, tmp_path):
    """A load over all tokens is computed from the choice as it was."""
    module = unflattened.Images().eval()
    graph, runner = exported(tools, tmp_path, module, torch.randn(2, 3, 4, unflattened.FEATURES))
    assert any("4 experts at" in note and "lowered as" in note for note in graph.notes), graph.notes
    x = torch.randn(3, 2, 5, unflattened.FEATURES)
    with torch.no_grad():
        wanted, load = module(x)
    (found, found_load) = runner.run({runner.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found_load, load.numpy(), rtol=1e-6)


def test_slots_that_compute_something_else_are_blocks_of_their_own(tools, tmp_path):
    """The second gate's rows count half."""
    module = unflattened.TwoGates(second=0.5).eval()
    graph, runner = exported(tools, tmp_path, module, torch.randn(2, 5, unflattened.FEATURES))
    assert len([note for note in graph.notes if "4 experts at" in note and "lowered as" in note]) == 2
    assert not any("stays as it was written" in note for note in graph.notes)
    x = torch.randn(3, 4, unflattened.FEATURES)
    with torch.no_grad():
        wanted = module(x).numpy()
    (found,) = runner.run({graph_input(runner): x.numpy()}).values()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
