"""Errors of ONNX Runtime are told as they are."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
from canaries import canary
from onnx import TensorProto, helper

from moe_export.verify.runners.onnxruntime_errors import has_no_kernel, is_no_model, reason_of

FILE = "verify/runners/onnxruntime_errors.py"


def error_of(model: bytes):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception) as caught:  # noqa: PT011
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return caught.value


def model_of(operator: str, kind: int) -> bytes:
    x, y = (helper.make_tensor_value_info(name, kind, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "one", [x], [y])
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


@pytest.mark.parametrize("content", [b"no model", b"", onnx.ModelProto(ir_version=8).SerializeToString()])
def test_canary_what_is_no_model(content):
    with canary(
        FILE,
        "bytes that are no model raise InvalidProtobuf, a model without a graph `No graph was found`",
        todo=f"match the class or the text in `is_no_model`: {error_of(content)!r}",
    ):
        assert is_no_model(error_of(content))


def test_canary_an_operator_without_a_kernel():
    error = error_of(model_of("Selu", TensorProto.DOUBLE))
    with canary(
        FILE,
        "an operator that has no kernel for a type raises a class called NotImplemented",
        todo=f"match the class in `has_no_kernel`: {error!r}; else graphs are not run in float64 by another engine",
    ):
        assert has_no_kernel(error)
        assert not is_no_model(error)


def test_canary_a_reason_has_no_preamble():
    error = error_of(model_of("Sinus", TensorProto.FLOAT))
    with canary(
        FILE,
        "messages begin with `[ONNXRuntimeError] : 10 : INVALID_GRAPH : `",
        todo=f"take the new preamble away in `reason_of`: {error}",
    ):
        assert str(error).startswith("[ONNXRuntimeError]")
        assert "ONNXRuntimeError" not in reason_of(error)
        assert "Sinus" in reason_of(error)
        assert not has_no_kernel(error)
