"""Reshapes that hold for empty tensors too.

torch's exporter writes `Reshape(x, [0, groups, -1])`: copy the first size, work out the last. For an expert without
tokens the first size is 0, nothing can be worked out from an empty tensor, and ONNX Runtime fails. Where the other
sizes are known, so is the -1.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir


def settle_reshapes(graph: ir.Graph) -> None:
    """Put numbers for each -1 that stands beside a copied size, where they are known; in place."""
    for node in graph.all_nodes():
        if node.op_type != "Reshape" or node.domain or node.attributes.get_int("allowzero", False):
            continue
        sizes = _settled(node)
        if sizes is not None:
            name = f"{node.outputs[0].name}_shape"
            value = ir.Value(
                name=name,
                shape=ir.Shape([len(sizes)]),
                type=ir.TensorType(ir.DataType.INT64),
                const_value=ir.tensor(np.array(sizes, dtype=np.int64), name=name),
            )
            graph.register_initializer(value)
            node.replace_input_with(1, value)


def _settled(node: ir.Node) -> list[int] | None:
    data, shape = node.inputs[0], node.inputs[1]
    if data is None or data.shape is None or shape is None or shape.const_value is None:
        return None
    wanted = [int(size) for size in shape.const_value.numpy().reshape(-1)]
    if 0 not in wanted or wanted.count(-1) != 1:
        return None
    left = [size for axis, size in enumerate(data.shape) if axis >= len(wanted) or wanted[axis] != 0]
    given = math.prod(size for size in wanted if size > 0)
    known = [size for size in left if isinstance(size, int)]
    if len(known) < len(left):
        return None
    total = math.prod(known)
    if given == 0 or total % given or total == 0:
        return None
    return [total // given if size == -1 else size for size in wanted]
