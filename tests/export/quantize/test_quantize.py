"""Packed graphs compute, to the last digits, what the float graph does with the weights that they stand for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from slow_cases import only

from moe_export.errors import NotExportableError, UsageError
from moe_export.export import Options
from moe_export.export.engines.build import build_engines
from moe_export.export.onnx.translate import check
from moe_export.export.pipeline import check_packing
from moe_export.export.quantize.find import find_weights
from moe_export.export.quantize.quantize import quantize
from moe_export.export.quantize.scheme import Scheme

LOWERINGS = ["slices", "loop", "gather", "blocks", "dense"]
SCHEMES = [
    ("int4", None, False, 21),
    ("int4", 16, True, 21),
    ("int8", None, False, 17),
    ("int8", None, True, 17),
    ("int8", None, False, 21),
    ("int8", 16, True, 21),
]
EVERY = [(lowering, *scheme) for lowering in LOWERINGS for scheme in SCHEMES]


@pytest.mark.parametrize(
    ("lowering", "packing", "block", "zero_points", "opset"),
    only([case for case in EVERY if case[0] in ("slices", "loop") and case[-1] == 21], EVERY),
)
def test_a_packed_graph_is_the_float_graph_with_other_weights(
    float_graph, results, lowering, packing, block, zero_points, opset
):
    model = float_graph(lowering, opset)
    found = quantize(model, Scheme.of(packing, block, zero_points=zero_points), "all")
    check(found.model)
    got, wanted, before = (results(each) for each in (found.model, found.exact, model))
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-6)
    assert not np.allclose(before["output"], wanted["output"], rtol=1e-5, atol=1e-6)
    assert {weight.kind for weight in found.weights} == {"experts", "linear"}
    assert not found.left


def test_8_bit_floats_are_read_by_slices_and_picked_by_nobody(float_graph, results):
    scheme = Scheme.of("float8e4m3", None)
    found = quantize(float_graph("slices"), scheme, "experts")
    np.testing.assert_allclose(results(found.model)["output"], results(found.exact)["output"], atol=1e-6)
    with pytest.raises(NotExportableError, match="picks no expert out of a stack of 8-bit floats"):
        quantize(float_graph("loop"), scheme, "experts")


def test_experts_are_picked_while_they_are_packed(float_graph):
    """No operator makes floats of a whole stack, so a run never does."""
    for packing in ("int4", "int8"):
        found = quantize(float_graph("loop"), Scheme.of(packing, None), "experts")
        stacks = {
            value.name: value
            for value in found.model.graph.initializers.values()
            if value.shape and len(value.shape) == 3
        }
        assert len([name for name in stacks if name.endswith((".int4", ".int8"))]) == 3
        for value in stacks.values():
            assert {use.node.op_type for use in value.uses()} == {"Gather"}


@pytest.mark.parametrize("packing", ["int4", "int8", "float8e4m3"])
def test_for_tensorrt_codes_are_read_by_dequantizelinear_alone(float_graph, results, packing):
    found = quantize(float_graph("blocks"), Scheme.of(packing, None, tensorrt=True), "all")
    stored = [value for name, value in found.model.graph.initializers.items() if name.endswith(f".{packing}")]
    assert len(stored) == 6
    for value in stored:
        assert {use.node.op_type for use in value.uses()} == {"DequantizeLinear"}
    scales = [value for name, value in found.model.graph.initializers.items() if name.endswith(".scale")]
    assert all((value.const_value.numpy() > 0).all() for value in scales)
    np.testing.assert_allclose(results(found.model)["output"], results(found.exact)["output"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("packing", "block"), [("int4", 64), ("int8", None), ("float8e4m3", None)])
def test_tensorrt_builds_it(float_graph, packing, block):
    found = quantize(float_graph("blocks"), Scheme.of(packing, block, tensorrt=True), "all")
    assert build_engines(found.model, ["sm89"])[0].size > 10_000


def test_products_are_such_that_onnxruntime_joins_them_with_their_weights(float_graph):
    """It joins DequantizeLinear with MatMul, not with Gemm; weights that Gemm would turn are stored turned."""
    found = quantize(float_graph("slices"), Scheme.of("int4", 32), "experts")
    readers = Counter(
        use.node.op_type
        for node in found.model.graph
        if node.op_type == "DequantizeLinear"
        for use in node.outputs[0].uses()
    )
    assert readers == {"MatMul": 12}


def test_what_is_asked_for_and_what_is_not(float_graph):
    model = float_graph("slices").clone()
    count = {asked: len(find_weights(model, asked)[0]) for asked in ("experts", "linear", "all")}
    assert count == {"experts": 12, "linear": 3, "all": 15}
    router = next(weight for weight in find_weights(model, "gate")[0])
    assert (router.name, router.kind) == ("gate.weight", "router")
    assert len(find_weights(model, "shared_experts.*,experts")[0]) == 15
    with pytest.raises(
        UsageError, match=r"--quantize nothing\.\*: no product of the graph has a weight of this name"
    ):
        find_weights(model, "nothing.*")


TIED = """
<ir_version: 10, opset_import: ["": 21]>
g (int64[n] ids, float[40, 20] embed, float[20, 40] other) => (float[n, 40] y) {
    rows = Gather(embed, ids)
    turned = Transpose <perm = [1, 0]> (embed)
    both = MatMul(rows, other)
    y0 = MatMul(rows, turned)
    y = Add(y0, both)
}
"""
ROUTED = """
<ir_version: 10, opset_import: ["": 21]>
g (float[n, 20] x, float[20, 8] router, float[20, 8] both) => (float[n, 2] y, float[n, 8] z) {
    logits = MatMul(x, router)
    scores = Softmax(logits)
    k = Constant <value_ints = [2]> ()
    y, ids = TopK(scores, k)
    z = Gemm <transB = 0> (x, both)
}
"""


def filled(text):
    """A graph whose inputs, but for the first, are weights."""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        array = np.random.default_rng(0).standard_normal(value.shape.numpy()).astype(np.float32)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return model


def test_a_weight_that_something_else_reads_stays_and_the_note_says_why():
    found = quantize(filled(TIED), Scheme.of("int4", None), "linear")
    assert [weight.name for weight in found.weights] == ["other"]
    assert found.notes() == (
        "1 weight of linear in int4, blocks of 32: 0.00 → 0.00 MiB (opset 21)",
        "left in float, read by Gather: embed",
    )


def test_a_router_is_packed_only_by_its_name():
    model = filled(ROUTED)
    assert [weight.name for weight in quantize(model, Scheme.of("int8", None), "all").weights] == ["both"]
    assert [weight.name for weight in quantize(model, Scheme.of("int8", None), "rout*").weights] == ["router"]


def test_that_there_was_nothing_to_pack_is_said():
    found = quantize(filled(ROUTED), Scheme.of("int8", None), "experts")
    assert found.notes() == ("int8: no weight of what was asked for was found; --quantize all would pack 1",)


def test_options_that_leave_packed_weights_no_room():
    with pytest.raises(UsageError, match="opset 17 has no operator for int4, blocks of 32"):
        check_packing(Options(weights_dtype="int4"))
    assert Options(weights_dtype="int4").at_opset().opset == 21
    assert Options(weights_dtype="int4", opset=23).at_opset().opset == 23
    assert Options(weights_dtype="int8").at_opset().opset == 17
