"""Language models of transformers with packed weights: checked against what the packed weights stand for."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

from moe_export.comparing.checking import verify_graph
from moe_export.comparing.packing_effect import effect_of
from moe_export.comparison_settings import ComparisonSettings
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.verify import Tolerance

FAMILIES = {family.name: family for family in families.FAMILIES}
MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


MODELS = Path(__file__).resolve().parents[2] / "models"


def subject_of(model):
    model.config.use_cache = False
    ids = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    return make_subject(model, (), {"input_ids": ids}, source=Path(__file__), how="test")


def graph_of(subject, **options):
    return export_subject(subject, Options(gates=False, **options).at_opset())[0]


def checked(graph, folder):
    """What packing does to a graph, which computes what its packed weights stand for."""
    assert {weight.kind for weight in graph.quantized.weights} == {"experts", "linear"}
    assert not graph.quantized.left
    write_model(graph.model, folder / "model.onnx")
    report, _ = verify_graph(graph, folder / "model.onnx", tolerance=Tolerance())
    assert report.verdict == "equal", report
    return effect_of(graph, "cpu", 0, ComparisonSettings())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "jamba", "qwen3_moe"])
def test_a_family_in_4_bits_is_what_its_weights_say(tmp_path, name):
    graph = graph_of(subject_of(FAMILIES[name].build_lm()), weights_dtype="int4", quantize="all")
    effect = checked(graph, tmp_path)
    assert len(effect.routers) >= 1
    assert 0 < effect.outputs["logits"] < 1  # of random weights, which no training has made robust


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["int4", "int8", "float8e4m3"])
@pytest.mark.parametrize("name", ["sparse_moe", "hybrid"])
def test_a_model_of_this_repository_is_what_its_packed_weights_say(tmp_path, name, packing):
    graph = graph_of(load_subject(str(MODELS / f"{name}.py")), weights_dtype=packing, quantize="all")
    effect = checked(graph, tmp_path)
    assert len(effect.routers) == 1
    assert 0 < max(effect.outputs.values()) < 1  # what comes from the router alone does not move


@pytest.mark.slow
def test_experts_that_were_mxfp4_are_taken_over_as_they_are():
    model = FAMILIES["gpt_oss"].build_lm()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "experts" in name and weight.dim() == 3:
                picked = MXFP4[torch.randint(0, 8, weight.shape, generator=generator)]
                signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
                weight.copy_(picked * signs / 64)
    graph = graph_of(subject_of(model), weights_dtype="int8", block_size=32)
    effect = effect_of(graph, "cpu", 0, ComparisonSettings())
    assert len(effect.weights) == 2 * 2 * 4
    assert max(weight.error for weight in effect.weights) < 1e-7
    assert effect.outputs["logits"] < 1e-6
    assert not any(router.flipped for router in effect.routers)
