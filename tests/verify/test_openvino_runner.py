"""OpenVINO as an engine: what goes in and comes out, and what it refuses, by node and line."""

from __future__ import annotations

import builtins

import ml_dtypes
import numpy as np
import onnx
import pytest

from moe_export.errors import MissingBackendError, UsageError
from moe_export.verify import RunFailedError, TensorSpec
from moe_export.verify.localise.level import run_model
from moe_export.verify.localise.optimised import find_engine_fault
from moe_export.verify.runners.openvino_runner import OpenVinoRunner, run_part

ADD = "g (float[batch,4] x, int64[4] i) => (float[batch,4] y, int64[4] j) { y = Add(x, x) j = Neg(i) }"
X = np.arange(8, dtype=np.float32).reshape(2, 4)
IDS = np.arange(4)


@pytest.fixture
def graph(graph_bytes):
    return lambda text, **constants: OpenVinoRunner(graph_bytes(text, **constants), threads=1)


def with_line(data: bytes, name: str) -> bytes:
    """The node of this name with a line of a model, as exported graphs have."""
    model = onnx.load_from_string(data)
    node = next(node for node in model.graph.node if node.name == name)
    for key, value in (("source", "net.py:12"), ("module", "mixer")):
        node.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def test_named_arrays_go_in_and_come_out_at_every_size(graph):
    runner = graph(ADD)
    assert runner.name == "openvino"
    assert runner.inputs == (TensorSpec("x", "float32", ("batch", 4)), TensorSpec("i", "int64", (4,)))
    first = runner.run({"x": X, "i": IDS})
    for rows in (X, X[:1], np.tile(X, (5, 1)), X[:0]):
        outputs = runner.run({"x": rows, "i": IDS})
        np.testing.assert_array_equal(outputs["y"], rows + rows)
        np.testing.assert_array_equal(outputs["j"], -IDS)
        assert outputs["j"].dtype == np.int64
    np.testing.assert_array_equal(first["y"], X + X)  # a later run writes elsewhere


def test_products_are_computed_in_float32(graph):
    """By default it may compute in bfloat16, which is off by 1e-2 here."""
    x, w = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
    found = graph("g (float[n,64] x, float[64,64] w) => (float[n,64] y) { y = MatMul(x, w) }").run(
        {"x": x, "w": w}
    )
    np.testing.assert_allclose(found["y"], x.astype(float) @ w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float8_e4m3fn", "bool", "uint8", "float64"])
def test_types_go_in_and_come_out_strided_and_empty(graph, kind):
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    onnx_name = {"float8_e4m3fn": "float8e4m3fn", "float64": "double"}.get(kind, kind)
    text = f"g ({onnx_name}[a,b] x) => ({onnx_name}[a,b] y) {{ y = Identity(x) }}"
    build = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 19]> {text}')
    runner = OpenVinoRunner(build.SerializeToString())
    x = np.arange(6).reshape(2, 3).astype(dtype)
    for array in (x, x.T, x[:0]):
        found = runner.run({"x": array})["y"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(float), array.astype(float))


def test_a_scalar_an_unused_input_and_a_path(graph_bytes, tmp_path):
    path = tmp_path / "g.onnx"
    path.write_bytes(
        graph_bytes("g (float[a] x, float s, float[b] unused) => (float[a] y) { y = Mul(x, s) }")
    )
    inputs = {"x": X[0], "s": np.float32(2), "unused": X[1]}
    np.testing.assert_array_equal(OpenVinoRunner(path).run(inputs)["y"], 2 * X[0])


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": X}, "input 'i' is missing; the graph takes i: int64[4]"),
        ({"x": X.astype(float), "i": IDS}, "input 'x' is float64[2, 4]"),
        ({"x": X[0], "i": IDS}, "input 'x' is float32[4]"),
    ],
)
def test_inputs_that_do_not_fit(graph, inputs, said):
    with pytest.raises(UsageError) as caught:
        graph(ADD).run(inputs)
    assert said in caught.value.what


def test_integers_beyond_int32_are_refused_not_cut_off(graph):
    with pytest.raises(RunFailedError, match="computes int64 as int32, which does not hold i's values"):
        graph(ADD).run({"x": X, "i": IDS + 2**40})


def test_what_cannot_be_read(tmp_path, graph_bytes):
    with pytest.raises(UsageError, match="no such file"):
        OpenVinoRunner(tmp_path / "none.onnx")
    for content in (b"import torch\n", b"", graph_bytes(ADD)[:20]):
        with pytest.raises(UsageError, match="not an ONNX model, or a truncated one"):
            OpenVinoRunner(content)


def test_without_the_package_it_is_a_missing_backend(graph_bytes, monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "openvino":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingBackendError, match="OpenVINO is not installed") as caught:
        OpenVinoRunner(graph_bytes(ADD))
    assert "moe-export[openvino]" in caught.value.hint


READS = """g (float[L,3] x, float[3] h, float[3] w) => (float[3] y, float[L,3] ys) {
    [loop] y, ys = Scan <num_scan_inputs = 1, body = b (float[3] s, float[3] e) => (float[3] n, float[3] o) {
        t = Mul(s, w) n = Add(t, e) o = Identity(n) }> (h, x) }"""


def test_a_refused_node_is_named_with_its_line(graph_bytes):
    with pytest.raises(UsageError) as caught:
        OpenVinoRunner(with_line(graph_bytes(READS), "loop"))
    assert caught.value.what.startswith("OpenVINO refuses the model: the body of a Scan reads a value")
    assert caught.value.where == "<bytes>: node Scan loop, net.py:12, module mixer"
    assert "--target openvino" in caught.value.hint


def test_an_operator_without_a_rule_is_named_with_its_line():
    text = "g (float[n] x) => (float[n] y) { [a] z = Neg(x) [b] y = org.example.Bar(z) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17, "org.example": 1]> {text}')
    with pytest.raises(UsageError) as caught:
        OpenVinoRunner(with_line(model.SerializeToString(), "b"))
    assert caught.value.what.endswith("No conversion rule found for operations: org.example.Bar")
    assert caught.value.where == "<bytes>: node org.example.Bar b, net.py:12, module mixer"


def test_what_fails_on_the_way_is_named_with_its_line(graph_bytes):
    """Also where the optimiser has made one node of two."""
    text = "g (float[a] x, float[b] z) => (float[c] y) { [neg] w = Neg(x) [add] y = Add(w, z) }"
    runner = OpenVinoRunner(with_line(graph_bytes(text), "add"))
    with pytest.raises(RunFailedError) as caught:
        runner.run({"x": np.ones(2, np.float32), "z": np.ones(3, np.float32)})
    assert caught.value.what.startswith("openvino failed: Eltwise shape infer")
    assert caught.value.where == "<bytes>: node Add add, net.py:12, module mixer"


def test_the_node_that_it_computes_otherwise_is_found(graph_bytes):
    """An index beyond the table: onnxruntime would refuse it; integers beyond int32 are its own."""
    text = """g (int64[n] x) => (float[n] y) {
        [mul] big = Mul(x, step) [div] low = Div(big, step) [cast] f = Cast<to=1>(low) [out] y = Neg(f) }"""
    model = onnx.load_from_string(with_line(graph_bytes(text, step=np.array(2**33)), "mul"))
    found = find_engine_fault(model, {"x": np.arange(1, 4)}, "openvino", run_part)
    assert found.localisation.faulty.node == "mul"
    assert "net.py:12" in str(found)
    assert str(found).startswith("onnxruntime computes the graph right, openvino does not\n")


def test_a_part_gives_what_onnxruntime_gives(graph_bytes):
    model = onnx.load_from_string(graph_bytes(ADD))
    inputs = {"x": X, "i": IDS}
    for mine, theirs in zip(run_part(model, inputs, "none"), run_model(model, inputs), strict=True):
        np.testing.assert_array_equal(mine, theirs)
