"""Tied weights are stored once: what is a weight transposed is computed from it, if the weight is in the graph as well.

    before   Gather(embed.weight, ids)   MatMul(h, embed.weight.transpose)     two tensors, (v, d) and (d, v)
    after    Gather(embed.weight, ids)   MatMul(h, Transpose(embed.weight))    one

In the same form a graph takes from a file what lies there the other way round, as nn.Linear's weights do:

    before   MatMul(h, up.weight.transpose)     a copy beside the graph
    after    MatMul(h, Transpose(up.weight))    the bytes of the file

Runtimes transpose it when they load the graph, as they fold any constant: ONNX Runtime (1.31) is as fast with it, and
has as much in memory, because its products keep weights in an order of their own either way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from moe_export.export.onnx.bodies import initializers
from moe_export.export.weights.recipe import ByteRange, RecipeTensor, Transposed, recipe_of

_SUFFIX = ".transpose"  # what `weight_names` puts behind the name of a weight


def store_once(graph: ir.Graph) -> None:
    """Replace transposed copies of weights (a, b), in place."""
    for name, copied in list(graph.initializers.items()):
        weight = graph.initializers.get(name.removesuffix(_SUFFIX))
        if weight is None or weight is copied or not _is_transposed(weight, copied):
            continue
        _turn_in_graph(graph, copied, weight)


def keep_as_stored(model: ir.Model, usable: Callable[[ByteRange], bool]) -> None:
    """Have the weights (a, b) of products as their files have them, (b, a), in place.

    A stack that experts are picked from is left as it is: no product takes all of it, so a runtime would keep it twice.

    Args:
        model: Its weights are recipes.
        usable: Whether the graph may point to such bytes.
    """
    for copied in list(initializers(model)):
        recipe, graph = recipe_of(copied), copied.graph
        if graph is None or not isinstance(recipe, Transposed) or recipe.order != (1, 0):
            continue
        place = recipe.source.byte_range()
        if place is None or not usable(place) or not _only_in_products(copied):
            continue
        name = str(copied.name).removesuffix(_SUFFIX)
        if name in graph.initializers:
            name = f"{copied.name}.stored"
        tensor = RecipeTensor(recipe.source, name)
        kind = ir.TensorType(tensor.dtype)
        weight = ir.Value(name=name, shape=ir.Shape(recipe.source.shape), type=kind, const_value=tensor)
        graph.register_initializer(weight)
        _turn_in_graph(graph, copied, weight)


def _only_in_products(weight: ir.Value) -> bool:
    """Whether it is the right operand of every node that reads it, and each is a product."""
    return not weight.is_graph_output() and all(
        use.node.op_type in ("MatMul", "Gemm") and not use.node.domain and use.idx == 1
        for use in weight.uses()
    )


def _turn_in_graph(graph: ir.Graph, copied: ir.Value, weight: ir.Value) -> None:
    """Compute a transposed copy from the weight, under the copy's name."""
    name = str(copied.name)
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
