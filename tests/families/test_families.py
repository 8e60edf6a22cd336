"""transformers' mixtures of experts: the block and the whole model, exported and equal at other token counts.

Onnxruntime and OpenVINO both run every graph.
"""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import only
from threads import onnxruntime_threads

from moe_export.comparing.checking import verify_graph
from moe_export.comparison_settings import ComparisonSettings
from moe_export.errors import UsageError
from moe_export.export.engines.build import build_engines
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.reductions import reductions_by_sum
from moe_export.export.onnx.serialize import write_model
from moe_export.export.pipeline import Options, export_subject
from moe_export.verify import Tolerance
from moe_export.verify.runners.openvino_runner import OpenVinoRunner

FOUR = ("mixtral", "deepseek_v3", "gpt_oss", "jetmoe")
CAPABILITIES = ("sm75", "sm86", "sm89", "sm120")
BY_NAME = {family.name: family for family in families.FAMILIES}


def session_of(model: ir.Model) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class Engines:
    """A graph in onnxruntime and, as it is written for OpenVINO where that refuses it, in OpenVINO."""

    def __init__(self, graph) -> None:
        self._session = session_of(graph.model)
        model = graph.model.clone()
        if reductions_by_sum(model):
            with pytest.raises(UsageError, match="overlooks the attribute axes"):
                OpenVinoRunner(ir.to_proto(graph.model).SerializeToString())
        self._openvino = OpenVinoRunner(ir.to_proto(model).SerializeToString())

    def run(self, feeds):
        """The outputs of each."""
        yield self._session.run(None, feeds)
        yield list(self._openvino.run(feeds).values())


def assert_equal(subject, engines, inputs, tolerance) -> None:
    with torch.no_grad():
        expected = subject.call([value.clone() for value in inputs])
    feeds = dict(zip(subject.inputs, (value.numpy() for value in inputs), strict=True))
    for found in engines.run(feeds):
        for got, want in zip(found, expected, strict=True):
            assert got.shape == tuple(want.shape)
            np.testing.assert_allclose(got, want.numpy(), rtol=tolerance, atol=tolerance)


def check_block(name: str) -> None:
    family = BY_NAME[name]
    block = family.build().get_submodule(family.block)
    subject = make_subject(block, (torch.randn(2, 5, 16),), {}, source=Path(__file__), how="test")
    graph = export_subject(subject, Options(gates=False, simplify=False))[0]
    assert sum("lowered as" in note for note in graph.notes) == 1, graph.notes
    assert not any("stay" in note for note in graph.notes)
    engines = Engines(graph)
    for batch, length in ((1, 1), (1, 3), (3, 5), (8, 8), (1, 257)):
        assert_equal(subject, engines, [torch.randn(batch, length, 16)], 2e-5)
    # All tokens alike go to the same experts; one at a time, each expert is alone at some token.
    for seed in range(6):
        same = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(seed)).expand(2, 7, 16)
        assert_equal(subject, engines, [same.contiguous()], 2e-5)


def check_model(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    names = ["input_ids"] + ["decoder_input_ids"] * (name == "nllb_moe")
    mask = ["attention_mask"] * (name == "switch_transformers")  # it makes none of its own while it is traced

    def example(batch, length):
        ids = {each: torch.randint(3, 32, (batch, length)) for each in names}
        return ids | {each: torch.ones(batch, length, dtype=torch.int64) for each in mask}

    subject = make_subject(model, (), example(2, 7), source=Path(__file__), how="test")
    graph = export_subject(subject, Options(gates=False, simplify=False))[0]
    assert any("lowered as" in note for note in graph.notes), graph.notes
    fixed = any("is fixed" in note and "(sequence, " in note for note in graph.notes)
    engines = Engines(graph)
    for batch, length in ((2, 7),) if fixed else ((1, 1), (1, 3), (3, 5), (8, 8)):
        assert_equal(subject, engines, list(example(batch, length).values()), 1e-4)


@pytest.mark.parametrize("name", only(["mixtral", "gpt_oss"], FOUR))
def test_blocks_of_four_ways_to_write_experts(name):
    check_block(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in FOUR])
def test_blocks_of_the_other_families(name):
    check_block(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_whole_models(name):
    check_model(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_no_block_is_refused_by_verification(name, tmp_path):
    """At 20 seeds, with one thread and with two."""
    block = BY_NAME[name].build().get_submodule(BY_NAME[name].block)
    subject = make_subject(block, (torch.randn(2, 5, 16),), {}, source=Path(__file__), how="test")
    graph = export_subject(subject, Options(gates=False))[0]
    write_model(graph.model, tmp_path / "block.onnx")
    for threads in (1, 2):
        with onnxruntime_threads(threads):
            report, _ = verify_graph(
                graph, tmp_path / "block.onnx", tolerance=Tolerance(), settings=ComparisonSettings(seeds=20)
            )
        assert report.verdict == "equal", str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_blocks_build_for_every_gpu(name):
    """8,192 tokens at most: far above the 3,840 at which TensorRT's TopK stops."""
    family = BY_NAME[name]
    block = family.build().get_submodule(family.block)
    subject = make_subject(block, (torch.randn(2, 5, 16),), {}, source=Path(__file__), how="test")
    graph = export_subject(subject, Options(gates=False, target="tensorrt"))[0]
    assert_equal(subject, Engines(graph), [torch.randn(1, 33, 16)], 2e-5)
    engines = build_engines(graph.model, CAPABILITIES, {"batch": (1, 1, 1), "sequence": (1, 128, 8192)})
    assert [engine.capability for engine in engines] == list(CAPABILITIES)
