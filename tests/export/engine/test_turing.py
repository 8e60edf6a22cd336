"""Float32 products as multiplications and sums: the same numbers, and engines for Turing."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moe_export.export.engines.build import build_engines
from moe_export.export.engines.graph_file import as_built
from moe_export.export.engines.turing import without_float32_products

SCAN = """g (float[n, 2, 5] x, float[2, 5] h) => (float[2, 5] y, float[n, 2, 5] z) <float[5, 5] w = {{{w}}}> {{
    y, z = Scan <num_scan_inputs = 1, body = turn (float[2, 5] a, float[2, 5] v) => (float[2, 5] o, float[2, 5] q)
        {{ p = MatMul(a, w) o = Add(p, v) q = Identity(o) }}>(h, x)
}}""".format(w=", ".join(str(0.01 * number) for number in range(25)))
PRODUCTS = {
    "matrices": "g (float[n, 5] x, float[5, 7] w) => (float[n, 7] y) { y = MatMul(x, w) }",
    "batches": "g (float[n, 3, 4, 5] x, float[n, 3, 5, 7] w) => (float[n, 3, 4, 7] y) { y = MatMul(x, w) }",
    "broadcast left": "g (float[4, 5] x, float[n, 3, 5, 7] w) => (float[n, 3, 4, 7] y) { y = MatMul(x, w) }",
    "broadcast right": "g (float[n, 3, 4, 5] x, float[5, 7] w) => (float[n, 3, 4, 7] y) { y = MatMul(x, w) }",
    "vector left": "g (float[5] x, float[n, 5, 7] w) => (float[n, 7] y) { y = MatMul(x, w) }",
    "vector right": "g (float[n, 4, 5] x, float[5] w) => (float[n, 4] y) { y = MatMul(x, w) }",
    "vectors": "g (float[5] x, float[5] w, float[n] z) => (float[n] y) { p = MatMul(x, w) y = Add(p, z) }",
    "inferred": "g (float[n, 5] x, float[5, 7] w) => (float[n, 7] y) { a = Exp(x) b = Transpose(w) c = Transpose(b) "
    "y = MatMul(a, c) }",
    "Gemm": "g (float[n, 5] x, float[5, 7] w) => (float[n, 7] y) { y = Gemm(x, w) }",
    "Gemm with all": "g (float[5, n] x, float[7, 5] w, float[7] c) => (float[n, 7] y) "
    "{ y = Gemm<transA = 1, transB = 1, alpha = 0.5, beta = 2.0>(x, w, c) }",
    "Scan": SCAN,
}  # fmt: skip


def run(model, inputs):
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def operators(model):
    return {node.op_type for node in model.graph.all_nodes()}


@pytest.mark.parametrize("name", PRODUCTS)
def test_it_computes_the_same_and_builds_for_turing(onnx_graph, name):
    proto = onnx_graph(PRODUCTS[name])
    before = ir.from_proto(proto)
    after, count = without_float32_products(before)
    assert count == 1
    assert operators(after) & {"MatMul", "Gemm"} == set()
    assert operators(before) & {"MatMul", "Gemm"}, "the graph that was given is left as it was"
    rng = np.random.default_rng(0)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    inputs = {
        name: rng.standard_normal([3 if dim.dim_param else dim.dim_value for dim in dims]).astype(np.float32)
        for name, dims in shapes.items()
    }
    for want, got in zip(run(proto, inputs), run(ir.to_proto(after), inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    (engine,) = build_engines(proto, ["sm75"], {"n": (1, 3, 8)})
    assert engine.notes == (
        "1 float32 matrix products became multiply and sum: TensorRT-RTX has none for Turing; float16 is faster",
    )
    assert build_engines(proto, ["sm80"])[0].notes == ()


def test_names_and_places_stay(onnx_graph):
    proto = onnx_graph(PRODUCTS["Gemm with all"], source="model.py:12")
    proto.graph.node[0].name = "node_linear"
    after, _ = without_float32_products(ir.from_proto(proto))
    assert [node.name for node in after.graph][-1] == "node_linear"
    assert {node.metadata_props.get("source") for node in after.graph} == {"model.py:12"}
    assert [value.name for value in after.graph.outputs] == ["y"]


@pytest.mark.parametrize(
    "text",
    [
        "g (float16[n, 5] x, float16[5, 7] w) => (float16[n, 7] y) { y = MatMul(x, w) }",
        "g (float[n, 5] x, float[n, 5] w) => (float[n, 5] y) { y = Mul(x, w) }",
    ],
)
def test_other_graphs_stay(onnx_graph, text):
    proto = onnx_graph(text)
    after, count = without_float32_products(ir.from_proto(proto))
    assert count == 0
    assert [node.op_type for node in after.graph] == [node.op_type for node in proto.graph.node]
    assert build_engines(proto, ["sm75"])[0].notes == ()


def test_the_value_of_the_product_is_never_kept(onnx_graph):
    """4096 x 256 x 512 floats would be 2 GB; the result of 4096 x 512 is 8 MB."""
    proto = onnx_graph("g (float[n, 256] x, float[256, 512] w) => (float[n, 512] y) { y = MatMul(x, w) }")
    (engine,) = build_engines(proto, ["sm75"], {"n": (1, 64, 4096)})
    assert engine.memory["activations"] < 20e6


def test_weights_are_put_back_from_the_graph_that_an_engine_was_built_from(onnx_graph, tmp_path):
    onnx.save(onnx_graph(PRODUCTS["matrices"]), tmp_path / "m.onnx")
    for capability, product, own in (
        ("sm75", "tensorrt-rtx", False),
        ("sm75", "tensorrt", True),
        ("sm89", "tensorrt-rtx", True),
    ):
        with as_built(tmp_path / "m.onnx", capability, product) as file:
            assert (file == tmp_path / "m.onnx") == own
            assert ("MatMul" in {node.op_type for node in onnx.load(file).graph.node}) == own
