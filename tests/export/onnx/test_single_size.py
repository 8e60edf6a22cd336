"""A side written for a size of 1: it becomes a branch, without slices, and products of both sides stand once."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from moe_export.export.onnx.sides import sides_in_branches

SHAPES = {"f": ["B", 1, 8], "a": ["B", 1, 256], "p": ["B", 1, 256], "d": ["B", 1, 8], "y": ["B", "N", 8]}
HEAD = """
  s = Shape<start = 1, end = 2>(x)  n = Squeeze(s)  c = Equal(n, one)
  f = Slice(x, zero, ones, ones, ones)
"""
BODY = HEAD + "a = MatMul(f, w) p = Relu(a) d = MatMul(p, u) e = MatMul(x, w) g = Tanh(e) h = MatMul(g, u)"


def model(body: str, number: int = 1, axis: int = 1) -> ir.Model:
    text = (
        '<ir_version: 8, opset_import: ["" : 17]>'
        f"g (float[B, N, 8] x) => (float[B, N, 8] y) {{ {body.replace('axis', str(axis))} y = Where(c, d, h) }}"
    )
    proto = onnx.parser.parse_model(text)
    draw = np.random.default_rng(0)
    values = {
        "one": np.array(number), "zero": np.array([0]), "ones": np.array([1]),
        "w": draw.normal(size=(8, 256)).astype(np.float32), "u": draw.normal(size=(256, 8)).astype(np.float32),
    }  # fmt: skip
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    found = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in found.graph:
        for value in node.outputs:
            if value.name in SHAPES:
                value.shape = ir.Shape(SHAPES[value.name])
    return found


def run(found: ir.Model, length: int) -> np.ndarray:
    proto = ir.to_proto(found)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    x = np.random.default_rng(1).normal(size=(2, length, 8)).astype(np.float32)
    return session.run(None, {"x": x})[0]


def test_slices_go_and_products_stand_once() -> None:
    found = model(BODY)
    before = {length: run(found, length) for length in (1, 3)}
    assert sides_in_branches(found) == 1
    assert [node.op_type for node in found.graph] == ["Shape", "Squeeze", "Equal", "MatMul", "If", "MatMul"]
    branch = next(node for node in found.graph if node.op_type == "If")
    inside = [branch.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    assert [[node.op_type for node in graph] for graph in inside] == [["Relu"], ["Tanh"]]
    for length, wanted in before.items():
        np.testing.assert_allclose(run(found, length), wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(before[1], np.tanh(before[1]))


def test_a_condition_on_another_number_says_nothing() -> None:
    found = model(BODY, number=2)
    assert sides_in_branches(found) == 0


def test_the_size_of_another_axis_says_nothing() -> None:
    found = model(BODY.replace("start = 1, end = 2", "start = 0, end = 1"))
    assert sides_in_branches(found) == 0


@pytest.mark.parametrize("product", ["MatMul(p, v)", "Add(p, p)"])
def test_other_ends_stay(product: str) -> None:
    body = BODY.replace("d = MatMul(p, u)", f"v = Neg(u) d0 = {product} d = MatMul(d0, u)")
    body = body if product.startswith("Add") else body.replace("d = MatMul(d0, u)", "d = Neg(d0)")
    found = model(body)
    before = {length: run(found, length) for length in (1, 3)}
    assert sides_in_branches(found) == 1
    for length, wanted in before.items():
        np.testing.assert_allclose(run(found, length), wanted, rtol=1e-5, atol=1e-5)
