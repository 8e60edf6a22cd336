"""Which nodes become half precision, which stay, and where the casts stand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moe_export.export.onnx.float32_kernels import with_float32_kernels
from moe_export.export.precision.choices import find_choices, with_choices_out, with_forced_choices
from moe_export.export.precision.mixed import lower_precision

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'
WEIGHT = "<float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}>"
GATE = f"""g (float[n, 4] x) => (float[n, 2] p, int64[n, 2] i) {WEIGHT} {{
    h = Tanh(x) g = MatMul(h, w) l = MatMul(g, w) s = Softmax(l) k = Constant<value = int64[1] {{2}}>()
    p, i = TopK(s, k)
}}"""


def lowered(text, dtype="float16", keep=()):
    before = ir.from_proto(onnx.parser.parse_model(HEAD + text))
    found = lower_precision(before.clone(), dtype, keep)
    onnx.checker.check_model(ir.to_proto(found.model), full_check=True)
    return found


def types(model):
    """The dtype of each value that a node makes, by name."""
    return {value.name: value.dtype.name for node in model.graph for value in node.outputs}


def operators(model):
    return [node.op_type for node in model.graph]


def run(model, **inputs):
    session = onnxruntime.InferenceSession(
        ir.to_proto(with_float32_kernels(model)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, inputs), strict=True))


def test_a_product_is_narrow_and_its_borders_are_cast_once():
    text = f"g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) {WEIGHT} {{ y = MatMul(x, w) z = MatMul(x, w) }}"
    found = lowered(text)
    assert operators(found.model).count("Cast") == found.casts == 3  # x once, y and z
    assert [value.dtype.name for value in found.model.graph.inputs] == ["FLOAT"]
    assert [(value.name, value.dtype.name) for value in found.model.graph.outputs] == [
        ("y", "FLOAT"),
        ("z", "FLOAT"),
    ]
    assert {name: value.dtype.name for name, value in found.model.graph.initializers.items()} == {
        "w.float16": "FLOAT16"
    }


@pytest.mark.parametrize("operator", ["Softmax", "Exp", "Log", "Softplus", "Sqrt", "Reciprocal", "Sin"])
def test_what_needs_it_stays_float32(operator):
    found = lowered(f"g (float[n, 4] x) => (float[n, 4] y) {WEIGHT} {{ a = MatMul(x, w) y = {operator}(a) }}")
    assert types(found.model)["y"] == "FLOAT"
    assert types(found.model)["a"] == "FLOAT16"


def test_norms_stay_float32():
    found = lowered(
        "g (float[n, 4] x) => (float[n, 4] y) <float[4] s = {1, 1, 1, 1}, float[4, 4] w = {"
        + ", ".join("1" * 16)
        + "}> { a = MatMul(x, w) y = LayerNormalization<axis = -1>(a, s) }"
    )
    assert types(found.model)["y"] == "FLOAT"


def test_the_logits_of_a_choice_stay_float32_from_the_product_on():
    kinds = types(lowered(GATE).model)
    assert (kinds["l"], kinds["s"], kinds["g"]) == ("FLOAT", "FLOAT", "FLOAT16")


def test_decays_and_their_products_stay_float32():
    text = f"""g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) {WEIGHT} {{
        a = MatMul(x, w) e = Exp(a) m = Mul(e, e) y = MatMul(m, w) s = Softmax(a) z = MatMul(s, w)
    }}"""
    found = lowered(text)
    kinds = types(found.model)
    assert kinds["y"] == "FLOAT"  # part of a recurrence
    assert "z.float16" in kinds  # attention


def test_a_recurrence_and_what_it_reads_stay_float32():
    text = f"""g (float[n, 4] x, float[4] h) => (float[4] y, float[n, 4] z) {WEIGHT} {{
        a = MatMul(x, w) b = MatMul(a, w)
        y, z = Scan <num_scan_inputs = 1, body = turn (float[4] s, float[4] v) => (float[4] o, float[4] q)
            {{ m = Mul(s, v) o = Add(m, v) q = Identity(o) }}>(h, b)
    }}"""
    kinds = types(lowered(text).model)
    assert (kinds["y"], kinds["z"], kinds["b"], kinds["a"]) == ("FLOAT", "FLOAT", "FLOAT", "FLOAT16")


def test_a_body_reads_narrow_values_of_the_graph_around_it_as_float32():
    text = f"""g (float[n, 4] x, bool c) => (float[n, 4] y) {WEIGHT} {{
        a = MatMul(x, w)
        y = If(c) <then_branch = t () => (float[n, 4] p) {{ p = Add(a, a) }},
                   else_branch = e () => (float[n, 4] q) {{ q = Identity(a) }}>
    }}"""
    found = lowered(text)
    assert types(found.model)["a"] == "FLOAT16"
    x = np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(
        run(found.model, x=x, c=np.array(True))["y"], 2 * np.arange(1, 17).reshape(4, 4)
    )


def test_bfloat16_is_valid_at_opset_17():
    """Conv has no bfloat16 before opset 22, MatMul has."""
    text = """g (float[n, 4, 8] x) => (float[n, 4, 8] y) <float[4, 4, 1] w = {%s}, float[8, 8] v = {%s}>
        { a = Conv(x, w) y = MatMul(a, v) }""" % (", ".join("1" * 16), ", ".join("1" * 64))  # fmt: skip # noqa: UP031
    assert types(lowered(text, "bfloat16").model)["a"] == "FLOAT"
    assert types(lowered(text, "float16").model)["a"] == "FLOAT16"
    assert "y.bfloat16" in types(lowered(text, "bfloat16").model)


def test_a_module_can_be_kept():
    before = onnx.parser.parse_model(
        HEAD
        + f"g (float[n, 4] x) => (float[n, 4] y) {WEIGHT} {{ a = MatMul(x, w) b = Tanh(a) y = MatMul(b, w) }}"
    )
    for node, module in zip(before.graph.node, ("layers.1", "layers.1.act", "layers.10"), strict=True):
        node.metadata_props.add(key="module", value=module)
    kinds = types(lower_precision(ir.from_proto(before), "float16", ["layers.1"]).model)
    assert (kinds["a"], kinds["b"], "y.float16" in kinds) == ("FLOAT", "FLOAT", True)


def test_weights_beyond_the_type_are_its_largest_value():
    text = """g (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w = {%s}, float[4] m = {-3e38, 1e9, 1, 0}>
        { a = MatMul(x, w) y = Add(a, m) }""" % ", ".join("1" * 16)  # fmt: skip # noqa: UP031
    found = lowered(text).model.graph.initializers["m.float16"].const_value.numpy()
    np.testing.assert_array_equal(found, np.array([-65504, 65504, 1, 0], np.float16))


def test_positions_stay_exact():
    text = f"""g (int64[n, 4] i, float[n, 4] x) => (float[n, 4] y) {WEIGHT}
        {{ p = Cast<to = 1>(i) a = MatMul(x, w) y = Add(p, a) }}"""
    found = lowered(text)
    assert types(found.model)["p"] == "FLOAT"
    far = np.full((1, 4), 4097, np.int64)  # float16 has 4096 and 4100
    np.testing.assert_array_equal(run(found.model, i=far, x=np.zeros((1, 4), np.float32))["y"], far)


def test_rounding_computes_what_float16_is():
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    found = lowered(f"g (float[n, 4] x) => (float[n, 4] y) {WEIGHT} {{ y = MatMul(x, w) }}")
    w = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    want = (x.astype(np.float16).astype(np.float32) @ w).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(run(found.model, x=x)["y"], want)


def test_choices_can_be_told():
    model = ir.from_proto(onnx.parser.parse_model(HEAD + GATE))
    assert len(find_choices(model)) == 1
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    own = run(with_choices_out(model), x=x)
    np.testing.assert_array_equal(own["moe_export.choice.0"], own["i"])
    forced = (own["i"] + 1) % 4
    told = run(with_forced_choices(model), x=x, **{"moe_export.forced.0": forced})
    np.testing.assert_array_equal(told["i"], forced)
    np.testing.assert_array_equal(told["moe_export.choice.0"], own["i"])
    np.testing.assert_array_equal(told["p"], np.take_along_axis(told["moe_export.scores.0"], forced, -1))
