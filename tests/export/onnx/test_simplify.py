"""onnxsim's proposal is taken where it is smaller and right, and only there."""

from __future__ import annotations

import sys
import types

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moe_export.export.onnx.simplify import simplify

FOLDS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] y) {
  one = Constant<value = float[2] {1, 1}> ()
  two = Add(one, one)
  y = Mul(x, two)
}"""
NOTHING = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }"""
X = {"x": np.array([[1.0, -2.0]], dtype=np.float32)}


def model(text):
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.fixture
def proposal(monkeypatch):
    """Put something else in onnxsim's place."""

    def put(function):
        monkeypatch.setitem(
            sys.modules, "onnxsim", types.SimpleNamespace(simplify=lambda model, **options: function(model))
        )

    return put


def test_a_gain_is_taken():
    result = simplify(model(FOLDS), X)
    assert result.note.startswith("onnxsim: 3 → ")
    assert [node.op_type for node in result.model.graph if node.op_type != "Constant"] == ["Mul"]


def test_no_gain_is_left_out():
    given = model(NOTHING)
    result = simplify(given, X)
    assert result.model is given
    assert result.note == "onnxsim skipped (no reduction: 1 → 1 nodes)"


def test_what_computes_something_else_is_left_out(proposal):
    wrong = onnx.parser.parse_model(NOTHING)
    proposal(lambda proto: (wrong, True))
    assert (
        simplify(model(FOLDS), X).note == "onnxsim left out: its graph computes something else (3 → 1 nodes)"
    )


NARROW = [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]


def narrow(text, name):
    """A graph in half precision; its constant is cast from float32."""
    return text.replace("float[n, 2]", f"{name}[n, 2]").replace(
        "two = Add(one, one)", f"sum = Add(one, one)\n  two = Cast<to = {CODES[name]}>(sum)"
    )


CODES = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize(("name", "kind"), NARROW)
def test_half_precision_is_judged_with_kernels_of_float32(proposal, name, kind):
    """onnxruntime's CPU may have no kernels for it, and NumPy no arrays."""
    given, x = model(narrow(FOLDS, name)), {"x": X["x"].astype(kind)}
    assert simplify(given, x).note.startswith("onnxsim: 4 → ")
    wrong = onnx.parser.parse_model(narrow(NOTHING, name))
    proposal(lambda proto: (wrong, True))
    assert simplify(given, x).note == "onnxsim left out: its graph computes something else (4 → 1 nodes)"


@pytest.mark.parametrize(("name", "kind"), NARROW)
def test_narrow_inputs_alone_are_half_precision(proposal, name, kind):
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g ({name}[n, 2] x) => (float[n, 2] y) {{ z = Cast<to = 1>(x)
      y = Neg(z) }}"""
    right = onnx.parser.parse_model(text)
    proposal(lambda proto: (right, True))
    more = text.replace("y = Neg(z)", "v = Neg(z)\n u = Neg(v)\n y = Neg(u)")
    assert simplify(model(more), {"x": X["x"].astype(kind)}).note == "onnxsim: 4 → 2 nodes"


def test_what_does_not_check_is_left_out(proposal):
    invalid = onnx.parser.parse_model(NOTHING.replace("Relu", "Rellu"))
    proposal(lambda proto: (invalid, True))
    assert "computes something else" in simplify(model(FOLDS), X).note


@pytest.mark.parametrize("kind", ["ReduceL1", "ReduceL2"])
def test_a_norm_that_divides_stays_nan_at_zeros(kind):
    """Onnxsim makes LpNormalization of it, which is 0 there in ONNX Runtime."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[n, 2] x) => (float[n, 2] y) {{
        one = Constant<value = float[1] {{1}}> () same = Mul(x, one)
        norm = {kind}<axes = [-1]> (same) y = Div(same, norm) }}"""
    kinds = [node.op_type for node in simplify(model(text), X).model.graph]
    assert kind in kinds
    assert "LpNormalization" not in kinds


@pytest.mark.parametrize(
    ("wrong_at", "y"),
    [
        ("zero", "n = ReduceL2<axes = [-1]> (x) t = LpNormalization(x) y = Add(t, t)"),
        ("infinity", "z = Sub(x, x) y = Add(x, z)"),
        ("nan", "y = Add(x, x)"),
    ],
)
def test_what_is_wrong_on_the_edge_only_is_left_out(proposal, wrong_at, y):
    right = {
        "zero": "n = ReduceL2<axes = [-1]> (x) a = Div(x, n) b = Div(x, n) y = Add(a, b)",
        "infinity": "a = Neg(x) b = Neg(a) c = Neg(b) y = Neg(c)",
        "nan": "one = Constant<value = float[1] {1}> () z = IsNaN(x) w = Where(z, one, x) y = Add(w, w)",
    }
    header = '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 2] x) => (float[n, 2] y) {'
    wrong = onnx.parser.parse_model(f"{header} {y} }}")
    proposal(lambda proto: (wrong, True))
    given = model(f"{header} {right[wrong_at]} }}")
    assert "computes something else" in simplify(given, X).note


def test_a_loop_that_would_not_end_at_infinity_is_asked_at_the_example_only():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 2] x) => (float[n, 2] y) {
        one = Constant<value = float[1] {1}> () same = Mul(x, one)
        begun = Constant<value = bool {1}> ()
        y = Loop<body = b (int64 i, bool c, float[n, 2] h) => (bool going, float[n, 2] half) {
            two = Constant<value = float {2}> ()
            half = Div(h, two)
            size = ReduceMax<keepdims = 0> (half)
            going = Greater(size, two)
        }> (, begun, same) }"""
    result = simplify(model(text), X)
    assert result.note.startswith("onnxsim")


def test_what_raises_is_left_out(proposal):
    def fail(proto):
        raise RuntimeError("inside")

    proposal(fail)
    assert simplify(model(FOLDS), X).note == "onnxsim left out: it raised RuntimeError"


def test_metadata_survives():
    given = model(FOLDS)
    for node in given.graph:
        node.metadata_props["source"] = f"model.py:{node.op_type}"
    kept = [
        node.metadata_props.get("source") for node in simplify(given, X).model.graph if node.op_type == "Mul"
    ]
    assert kept == ["model.py:Mul"]
