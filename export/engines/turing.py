"""Float32 matrix products for Turing (sm75), where TensorRT-RTX 1.7 has none.

    a @ b                 a (..., M, K), b (..., K, N)
    (a[..., :, :, None] * b[..., None, :, :]).sum(-2)

The builder fuses the multiplication and the sum into one kernel and keeps no (M, K, N) value: with M = 4096, K = 256,
N = 512 the engine asks for 8 MB of activations, the size of the result. On the tensor cores float16 is far faster;
this is for what must stay float32, as the logits of a router.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from moe_export.export.engines.refusal import all_nodes
from moe_export.graph_builder import GraphBuilder

CAPABILITY = "sm75"
NOTE = "{count} float32 matrix products became multiply and sum: TensorRT-RTX has none for Turing; float16 is faster"
_LOWEST_OPSET = 13  # axes became inputs of Unsqueeze and ReduceSum


def without_float32_products(model: ir.Model) -> tuple[ir.Model, int]:
    """A copy of a graph whose float32 MatMuls and Gemms are multiplications and sums; how many there were.

    The last node of each has the name and the metadata of the one that it replaces. Where the rank of an operand is
    not known, or the opset is below 13, a product stays.
    """
    copy = model.clone()
    if model.opset_imports.get("", 0) < _LOWEST_OPSET:
        return copy, 0
    if any(value.dtype is None for node in all_nodes(copy) for value in node.outputs):
        copy = ShapeInferencePass()(copy).model
    products = [node for node in all_nodes(copy) if node.op_type in {"MatMul", "Gemm"} and _is_float32(node)]
    return copy, sum(_Writer(node, node.graph).replace() for node in products if node.graph is not None)


def _is_float32(node: ir.Node) -> bool:
    dtypes = [value.dtype for value in (*node.inputs[:2], *node.outputs) if value is not None]
    return node.domain in {"", "ai.onnx"} and ir.DataType.FLOAT in dtypes


class _Writer:
    """Writes what stands for one product."""

    def __init__(self, node: ir.Node, graph: ir.Graph | ir.Function) -> None:
        self._node, self._graph = node, graph
        self._w = GraphBuilder(graph, f"{node.outputs[0].name}.product", node)

    def replace(self) -> bool:
        """Put the multiplication and the sum in the product's place; False if that cannot be."""
        node, made = self._node, self._w.nodes
        result = self._gemm() if node.op_type == "Gemm" else self._matmul()
        if result is None:
            return False
        old = node.outputs[0]
        result.type, result.shape = old.type, old.shape
        made[-1].name = node.name
        ir.convenience.replace_nodes_and_values(self._graph, node, [node], made, [old], [result])
        return True

    def _matmul(self) -> ir.Value | None:
        a, b = self._node.inputs
        if a is None or b is None or a.shape is None or b.shape is None:
            return None
        if len(b.shape) == 1:  # (..., M, K), (K,)
            return self._sum(self._w.op("Mul", a, b), -1)
        left = self._unsqueeze(a, -1)  # (..., M, K, 1)
        right = b if len(a.shape) == 1 else self._unsqueeze(b, -3)  # (..., 1, K, N)
        return self._sum(self._w.op("Mul", left, right), -2)

    def _gemm(self) -> ir.Value | None:
        w, attributes = self._w, self._node.attributes
        a, b, c = (*self._node.inputs, None)[:3]
        if a is None or b is None:
            return None
        if attributes.get_int("transA", 0):
            a = w.op("Transpose", a, perm=[1, 0])
        if attributes.get_int("transB", 0):  # (M, 1, K) * (N, K)
            out = self._sum(w.op("Mul", self._unsqueeze(a, 1), b), -1)
        else:  # (M, K, 1) * (K, N)
            out = self._sum(w.op("Mul", self._unsqueeze(a, 2), b), -2)
        out = self._times(out, attributes.get_float("alpha", 1.0))
        if c is None:
            return out
        return w.op("Add", out, self._times(c, attributes.get_float("beta", 1.0)))

    def _times(self, value: ir.Value, factor: float) -> ir.Value:
        return value if factor == 1.0 else self._w.op("Mul", value, self._constant(np.float32(factor)))

    def _unsqueeze(self, value: ir.Value, axis: int) -> ir.Value:
        return self._w.op("Unsqueeze", value, self._constant(np.array([axis], np.int64)))

    def _sum(self, value: ir.Value, axis: int) -> ir.Value:
        return self._w.op("ReduceSum", value, self._constant(np.array([axis], np.int64)), keepdims=0)

    def _constant(self, value: np.ndarray | np.generic) -> ir.Value:
        """In a node beside the product, which may be in a body."""
        return self._w.op("Constant", value=ir.tensor(np.asarray(value)))
