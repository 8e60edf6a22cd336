"""Reshapes and reductions of tensors without rows, which an expert without tokens has."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moe_export.export.reshapes import settle_axes, settle_reshapes

OPERATORS = [
    ("ReduceSum(x, last)", (0,)),
    ("ReduceMax<keepdims=1>(x, last)", (0, 1)),
    ("ArgMax<axis=-1, keepdims=1>(x)", (0, 1)),
    ("Reshape(x, halves)", (0, 2, 2)),
]


@pytest.mark.parametrize(("operator", "shape"), OPERATORS)
def test_no_rows(operator, shape):
    kind = "int64" if operator.startswith("Arg") else "float"
    kept = "" if "keepdims=1" in operator or "Reshape" in operator else "<keepdims=0>"
    operator = operator.replace("ReduceSum", f"ReduceSum{kept}")
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        g (float[n, 4] x) => ({kind}[{", ".join("abc"[: len(shape)])}] y)
        <int64[1] last = {{-1}}, int64[3] halves = {{0, 2, -1}}> {{ y = {operator} }}"""
    )
    model = ir.from_proto(proto)
    settle_reshapes(model.graph)
    settle_axes(model.graph)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for rows in (0, 3):
        (y,) = session.run(None, {"x": np.zeros((rows, 4), np.float32)})
        assert y.shape == (rows, *shape[1:])
