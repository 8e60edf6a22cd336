"""Tied weights are stored once: what is a weight transposed is computed from it, if the weight is in the graph as well.

    before   Gather(embed.weight, ids)   MatMul(h, embed.weight.transpose)     two tensors, (v, d) and (d, v)
    after    Gather(embed.weight, ids)   MatMul(h, Transpose(embed.weight))    one

Runtimes transpose it when they load the graph, as they fold any constant.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moe_export.export.weights.recipe import Transposed, recipe_of

_SUFFIX = ".transpose"  # what `weight_names` puts behind the name of a weight


def store_once(graph: ir.Graph) -> None:
    """Replace transposed copies of weights (a, b), in place."""
    for name, copied in list(graph.initializers.items()):
        weight = graph.initializers.get(name.removesuffix(_SUFFIX))
        if weight is None or weight is copied or not _is_transposed(weight, copied):
            continue
        node = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=name)
        (output,) = node.outputs
        output.type, output.shape = copied.type, copied.shape
        reader = next(iter(copied.uses())).node
        node.metadata_props.update(reader.metadata_props)
        copied.replace_all_uses_with(output)
        del graph.initializers[name]
        output.name = name
        graph.insert_before(graph[0], node)


def _is_transposed(weight: ir.Value, copied: ir.Value) -> bool:
    one, other = weight.const_value, copied.const_value
    if one is None or other is None or copied.is_graph_output() or not (weight.uses() and copied.uses()):
        return False
    own, made = recipe_of(weight), recipe_of(copied)
    if own is not None or made is not None:  # their values are not in memory; how they are made is
        return isinstance(made, Transposed) and made.order == (1, 0) and made.source == own
    if one.dtype != other.dtype:
        return False
    left, right = one.numpy(), other.numpy()
    return left.ndim == 2 and left.shape == right.shape[::-1] and np.array_equal(left.T, right)
