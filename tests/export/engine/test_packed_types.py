"""Packed weights in TensorRT-RTX: which GPUs it has code for, and models that it builds."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import onnx_ir as ir
import pytest
import torch
from slow_cases import only

from moe_export.errors import NotExportableError
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.engines import build
from moe_export.export.engines.build import build_engines
from moe_export.export.engines.rules import packed_types
from moe_export.export.frontend.subject import make_subject
from moe_export.export.quantize.quantize import quantize
from moe_export.export.quantize.scheme import Scheme

SINCE = {"int8": 75, "int4": 80, "float8e4m3": 89}
CAPABILITIES = ["sm75", "sm80", "sm86", "sm89", "sm120", "portable"]
EVERY = [(packing, capability) for packing in SINCE for capability in CAPABILITIES]
EDGES = [("int4", "sm75"), ("int4", "sm80"), ("float8e4m3", "sm86"), ("float8e4m3", "sm89")]
FAMILIES = {family.name: family for family in families.FAMILIES}
MODELS = Path(__file__).resolve().parents[3] / "models"


def product(packing):
    """A product with packed weights."""
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[n, 64] x, float[64, 32] w) => (float[n, 32] y) { y = MatMul(x, w) }"""
    model = ir.from_onnx_text(text)
    value = model.graph.inputs.pop()
    draw = np.random.default_rng(0)
    value.const_value = ir.tensor(draw.standard_normal((64, 32)).astype(np.float32), name="w")
    model.graph.register_initializer(value)
    return quantize(model, Scheme.of(packing, None, tensorrt=True), "linear").model


@pytest.mark.parametrize(("packing", "capability"), only(EDGES, EVERY))
def test_the_rule_is_what_tensorrt_says(monkeypatch, packing, capability):
    model = product(packing)
    refused = list(packed_types(model, capability))
    number = capability.removeprefix("sm")
    assert bool(refused) == (number.isdigit() and int(number) < SINCE[packing])
    if refused:
        with pytest.raises(
            NotExportableError, match=f"takes weights in {packing}.* from sm{SINCE[packing]} on"
        ):
            build_engines(model, [capability])
        monkeypatch.setattr(build, "_check_layers", lambda *_: None)
        with pytest.raises(NotExportableError, match="contains HW-specific datatypes"):
            build_engines(model, [capability])
    else:
        assert build_engines(model, [capability])[0].size > 1000


def subject_of(name):
    """A model of this repository, or a tiny language model of transformers."""
    if name not in FAMILIES:
        return load_subject(str(MODELS / f"{name}.py"))
    model = FAMILIES[name].build_lm()
    model.config.use_cache = False
    return make_subject(
        model, (), {"input_ids": torch.ones(2, 9, dtype=torch.int64)}, source=Path("model.py"), how=""
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packing", "capability"), [("int4", "sm80"), ("float8e4m3", "sm89"), ("int8", "sm75")]
)
@pytest.mark.parametrize("name", ["sparse_moe", "hybrid", "mixtral", "deepseek_v3", "gpt_oss", "jamba"])
def test_models_with_packed_weights_are_built(name, packing, capability):
    subject = subject_of(name)
    options = Options(gates=False, target="tensorrt", weights_dtype=packing, quantize="all", simplify=False)
    (graph,) = export_subject(subject, options.at_opset())
    assert {weight.kind for weight in graph.quantized.weights} == {"experts", "linear"}
    assert build_engines(graph.model, [capability])[0].size > 10_000
