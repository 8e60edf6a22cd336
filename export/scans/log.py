"""`logarithm`: the logarithm of a decay, read off how the model computes it rather than computed from its value.

    exp(dt * A)   → dt * A
    sigmoid(f)    → -softplus(-f)
    0.97          → log(0.97)

Anything else may be 0 or negative, and is refused.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moe_export.errors import RefusedError
from moe_export.export.scans.batched import BatchedOverTime, BatchedValue
from moe_export.export.scans.loop_region import LoopRegion
from moe_export.graph_builder import GraphBuilder

_VIEWS = {"Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


def logarithm(nodes: GraphBuilder, over: BatchedOverTime, value: ir.Value, loop: LoopRegion) -> BatchedValue:
    """The logarithm of a value of the step, batched over time.

    Raises:
        RefusedError: The value is not known to be positive.
    """
    boundary = next((boundary for boundary in loop.elements if boundary.outputs[0] is value), None)
    if boundary is not None:
        source = over.of(value)
        return BatchedValue(_outside(nodes, source.value), source.axis, source.rank)
    if value not in {output for node in loop.body for output in node.outputs}:
        same = over.of(value)
        return BatchedValue(_outside(nodes, value), None, same.rank)
    node = value.producer()
    assert node is not None
    if node.op_type == "Exp" and node.inputs[0] is not None:
        return over.of(node.inputs[0])
    if node.op_type == "Sigmoid" and node.inputs[0] is not None:
        inner = over.of(node.inputs[0])
        return BatchedValue(_log_sigmoid(nodes, inner.value), inner.axis, inner.rank)
    raise RefusedError(f"its decay, a {node.op_type}, is not known to be positive")


def _outside(nodes: GraphBuilder, value: ir.Value) -> ir.Value:
    """The logarithm of a value outside the loop."""
    tensor, node = value.const_value, value.producer()
    if tensor is not None:
        array = tensor.numpy()
        if not (array > 0).all():
            raise RefusedError("its decay is not positive")
        return nodes.constant(np.log(array.astype(np.float64)).astype(array.dtype))
    if node is None or node.inputs[0] is None:
        raise RefusedError("its decay is not known to be positive")
    if node.op_type == "Exp":
        return node.inputs[0]
    if node.op_type == "Sigmoid":
        return _log_sigmoid(nodes, node.inputs[0])
    if node.op_type in _VIEWS:
        (result,) = nodes.copy(node, [_outside(nodes, node.inputs[0]), *node.inputs[1:]])
        result.shape = value.shape
        return result
    raise RefusedError(f"its decay, a {node.op_type}, is not known to be positive")


def _log_sigmoid(nodes: GraphBuilder, value: ir.Value) -> ir.Value:
    return nodes.op("Neg", nodes.op("Softplus", nodes.op("Neg", value)))
