"""A graph in float64: the same operators and constants, every float value in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from moe_export.verify.localise.level import Value, run_model
from moe_export.verify.runners.onnxruntime_errors import has_no_kernel
from moe_export.verify.specs import Array, is_float

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_DOUBLE = onnx.TensorProto.DOUBLE


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in float64."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _widen(copy.graph)
    return copy


def run_in_float64(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Value]:
    """Run a graph in float64: in onnxruntime where it has the kernels, else in ONNX's reference implementation.

    Args:
        model: The graph as it is; it is not changed.
        inputs: Its inputs; floats are cast.

    Raises:
        Exception: The graph fails.
    """
    wide = in_float64(model)
    feeds: dict[str, Any] = {
        name: array.astype(np.float64) if is_float(array.dtype) else array for name, array in inputs.items()
    }
    try:
        return run_model(wide, feeds)
    except Exception as error:
        if not has_no_kernel(error):
            raise
    from onnx.reference import ReferenceEvaluator

    from moe_export.verify.float64_operators import GatherElements, Scan

    with np.errstate(all="ignore"):
        return list(ReferenceEvaluator(wide, new_ops=[Scan, GatherElements]).run(None, feeds))


def _widen(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        _widen_type(value.type)
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _widen(attribute.g)
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif attribute.name in {"to", "dtype"} and attribute.i in _FLOATS:
                attribute.i = _DOUBLE
        if node.op_type == "Constant":
            _widen_constant(node)
        elif node.op_type == "ConstantOfShape" and not node.attribute:
            zero = onnx.numpy_helper.from_array(np.zeros(1))
            node.attribute.append(onnx.helper.make_attribute("value", zero))


def _widen_constant(node: onnx.NodeProto) -> None:
    """`value_float` and `value_floats` are float32 by definition."""
    for attribute in list(node.attribute):
        if attribute.name in {"value_float", "value_floats"}:
            array = np.array(onnx.helper.get_attribute_value(attribute), np.float64)
            node.attribute.remove(attribute)
            node.attribute.append(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(array)))


def _widen_type(kind: onnx.TypeProto) -> None:
    if kind.HasField("tensor_type") and kind.tensor_type.elem_type in _FLOATS:
        kind.tensor_type.elem_type = _DOUBLE
    elif kind.HasField("sequence_type"):
        _widen_type(kind.sequence_type.elem_type)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
