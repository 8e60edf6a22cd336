"""What ONNX Runtime's own quantizer of weights in 4 bits makes of one."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer


def theirs(weight, block, *, symmetric):
    """What ONNX Runtime's quantizer makes of a weight (K, N), as values."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", float32, [1, len(weight)])],
        [helper.make_tensor_value_info("y", float32, [1, weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    maker = MatMulNBitsQuantizer(model, block_size=block, is_symmetric=symmetric)
    maker.process()
    (product,) = [node for node in maker.model.model.graph.node if node.op_type == "MatMulNBits"]
    found = {t.name: numpy_helper.to_array(t) for t in maker.model.model.graph.initializer}
    codes = apart(found[product.input[1]]).reshape(weight.shape[1], -1, block)
    scales = found[product.input[2]].reshape(weight.shape[1], -1, 1)
    zeros = 8.0 if symmetric else apart(found[product.input[3]].reshape(len(codes), -1))[..., None]
    return ((codes - zeros) * scales).reshape(len(codes), -1).T


def apart(halves):
    return np.stack([halves & 15, halves >> 4], -1).reshape(*halves.shape[:-1], -1).astype(np.float32)
