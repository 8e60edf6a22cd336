"""`reductions_by_sum`: the reductions whose attribute `axes` OpenVINO (2026.4) overlooks, by others that it computes.

    ReduceL1(x)          →   ReduceSum(Abs(x))
    ReduceLogSum(x)      →   Log(ReduceSum(x))
    ReduceLogSumExp(x)   →   Log(ReduceSum(Exp(x - m))) + m,  m = ReduceMax(x), 0 where that is infinite

It reduces all axes there (docs/findings.md). From opset 18 on the axes are an input, and it is right. ONNX defines the
three by these sums: https://onnx.ai/onnx/operators/onnx__ReduceLogSumExp.html
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moe_export.graph_builder import GraphBuilder

OVERLOOKED = frozenset({"ReduceL1", "ReduceLogSum", "ReduceLogSumExp"})


def reductions_by_sum(model: ir.Model) -> int:
    """Rewrite them, in place.

    Returns:
        How many were rewritten.
    """
    found = [
        node for node in model.graph.all_nodes() if node.op_type in OVERLOOKED and "axes" in node.attributes
    ]
    for node in found:
        result = _by_sum(GraphBuilder.in_front_of(node, str(node.name)), node)
        old = node.outputs[0]
        result.name, result.type, result.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    return len(found)


def _by_sum(write: GraphBuilder, node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    axes = list(node.attributes["axes"].as_ints())
    keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1

    def total(value: ir.Value) -> ir.Value:
        return write.op("ReduceSum", value, write.ints(*axes), keepdims=keep)

    if node.op_type == "ReduceL1":
        return total(write.op("Abs", x))
    if node.op_type == "ReduceLogSum":
        return write.op("Log", total(x))
    largest = write.op("ReduceMax", x, axes=axes, keepdims=1)
    zero = write.constant(np.zeros((), x.dtype.numpy() if x.dtype is not None else np.float32))
    largest = write.op("Where", write.op("IsInf", largest), zero, largest)
    logarithm = write.op("Log", total(write.op("Exp", write.op("Sub", x, largest))))
    return write.op("Add", logarithm, largest if keep else write.op("Squeeze", largest, write.ints(*axes)))
