"""`com.microsoft.QMoE`: a block of experts as one node of ONNX Runtime, with packed weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from sparse_moe import SparseMoe

from moe_export.export import Options
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.translate import check
from moe_export.export.quantize.quantize import quantize
from moe_export.export.quantize.scheme import Scheme
from moe_export.export.stages import Model, between, run
from moe_export.export.tracing.dims import DimRequest
from moe_export.verify import OnnxRuntimeRunner

ROWS = np.random.default_rng(0).standard_normal((2, 40, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    """Four experts of SwiGLU as a `MoE`, and a shared one beside it, in float."""
    torch.manual_seed(0)
    module = SparseMoe(32, 64, 4, 2, 1).eval()
    subject = make_subject(module, (torch.from_numpy(ROWS),), {}, source=Path(__file__), how="test")
    options = Options(opset=21, experts="contrib", simplify=False)
    return run(between("fold", "order"), Model.of(subject, DimRequest()), options).model


def output(model):
    content = ir.to_proto(model.clone()).SerializeToString()
    return OnnxRuntimeRunner(content).run({"hidden_states": ROWS})["output"]


@pytest.mark.parametrize("scheme", [Scheme.of("int4", 32), Scheme.of("int4", 64), Scheme.of("int8", None)])
def test_it_computes_what_its_weights_say(model, scheme):
    found = quantize(model, scheme, "experts")
    check(found.model)
    kinds = [node.op_type for node in found.model.graph]
    assert "QMoE" in kinds
    assert "MoE" not in kinds
    assert "DequantizeLinear" not in kinds
    got, wanted, before = map(output, (found.model, found.exact, model))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert not np.allclose(before, wanted, rtol=1e-5, atol=1e-6)


def test_its_weights_are_no_larger_than_packed(model):
    found = quantize(model, Scheme.of("int4", 32), "experts")
    sizes = [value.const_value.nbytes for value in found.model.graph.initializers.values()]
    first, second = 4 * 128 * 32, 4 * 32 * 64  # gate and up of four experts, down of four
    for count in (first, second):
        assert count // 2 in sizes
        assert count // 32 * 4 in sizes


@pytest.mark.parametrize(
    "scheme", [Scheme.of("int4", 32, zero_points=True), Scheme.of("int8", 32), Scheme.of("float8e4m3", None)]
)
def test_what_it_does_not_take_stays_in_float_and_a_note_says_so(model, scheme):
    found = quantize(model, scheme, "all")
    assert len(found.left) == 2
    assert "MoE" in [node.op_type for node in found.model.graph]
    assert any("com.microsoft.QMoE takes int4 in whole blocks" in note for note in found.notes())
    assert {weight.kind for weight in found.weights} == {"linear"}


def test_it_takes_all_weights_of_a_block_or_none(model):
    (name, *_) = [weight.name for weight in quantize(model, Scheme.of("int4", 32), "experts").weights]
    found = quantize(model, Scheme.of("int4", 32), name)
    assert not found.weights
    assert [one.reason for one in found.left] == ["com.microsoft.QMoE takes all weights of a block or none"]
