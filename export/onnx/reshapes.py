"""Reshapes and reductions that hold for empty tensors too.

torch's exporter writes `Reshape(x, [0, groups, -1])`: copy the first size, work out the last. For an expert without
tokens the first size is 0, nothing can be worked out from an empty tensor, and ONNX Runtime fails. Where the other
sizes are known, so is the -1; where they are free, as the height and width of an image, the graph works it out.

Of an empty tensor, ONNX Runtime 1.31 takes no notice of a negative axis: the sum of (0, 2) over the axis -1 is (0, 2).
Counted from the front, it is (0, 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from moe_export.export.torch_compat.metadata import is_translation_of, traced_as
from moe_export.graph_builder import Constants, GraphBuilder

Size = int | ir.SymbolicDim
_DATA_SIZE = re.compile(r"\bu\d+\b")


def is_of_data(size: Size) -> bool:
    """Whether only values decide a size: how many rows a mask picks. It can be 0."""
    return not isinstance(size, int) and _DATA_SIZE.search(size.value or "") is not None


def settle_reshapes(graph: ir.Graph, may_be_zero: Callable[[Size], bool] = is_of_data) -> None:
    """Put a size for each -1 that stands beside a copied size; in place.

    Args:
        graph: As the exporter translated it.
        may_be_zero: Whether a copied size can be 0. If none of them can, a -1 that no number is known for stays.
    """
    for node in [*graph.all_nodes()]:
        if node.op_type != "Reshape" or node.domain or node.attributes.get_int("allowzero", False):
            continue
        wanted = _wanted(node)
        if 0 not in wanted or wanted.count(-1) != 1:
            continue
        sizes = _settled(node, wanted)
        if sizes is not None:
            _give(graph, node, sizes, "shape")
        else:
            _work_out(node, wanted, may_be_zero)


def _wanted(node: ir.Node) -> list[int]:
    """The sizes that a reshape asks for, if they are constant and the rank of what it takes is known."""
    data, shape = node.inputs[0], node.inputs[1]
    if data is None or data.shape is None or shape is None or shape.const_value is None:
        return []
    return [int(size) for size in shape.const_value.numpy().reshape(-1)]


def _work_out(node: ir.Node, wanted: Sequence[int], may_be_zero: Callable[[Size], bool]) -> None:
    """`Reshape(x, [0, 4, -1])` of x (n, c, h, w) → `Reshape(x, [0, 4, c * h * w / 4])`, of sizes that the graph has."""
    data = node.inputs[0]
    assert data is not None
    assert data.shape is not None
    copied = wanted.count(0)
    if any(wanted[:copied]) or not any(map(may_be_zero, data.shape[:copied])):
        return
    nodes = GraphBuilder.in_front_of(node, node.name or "reshape")
    rest = nodes.op("ReduceProd", nodes.op("Shape", data, start=copied), keepdims=1)
    given = math.prod(size for size in wanted if size > 0)
    left = nodes.op("Div", rest, nodes.ints(given)) if given > 1 else rest
    # Of a `Concat`, onnxsim would make -1 again.
    is_open = nodes.constant(np.array([size == -1 for size in wanted]))
    node.replace_input_with(1, nodes.op("Where", is_open, left, nodes.ints(*wanted)))


def _settled(node: ir.Node, wanted: Sequence[int]) -> list[int] | None:
    data = node.inputs[0]
    assert data is not None
    assert data.shape is not None
    left = [size for axis, size in enumerate(data.shape) if axis >= len(wanted) or wanted[axis] != 0]
    given = math.prod(size for size in wanted if size > 0)
    known = [size for size in left if isinstance(size, int)]
    if len(known) < len(left):
        return None
    total = math.prod(known)
    if given == 0 or total % given or total == 0:
        return None
    return [total // given if size == -1 else size for size in wanted]


_OVER_AXES = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare",
}  # fmt: skip
_OVER_AXIS = {"ArgMax", "ArgMin"}


def settle_axes(graph: ir.Graph) -> None:
    """Count the axes of reductions from the front, where the rank is known; in place."""
    for node in graph.all_nodes():
        data = node.inputs[0] if node.inputs else None
        if node.domain or data is None or data.shape is None:
            continue
        rank = len(data.shape)
        if node.op_type in _OVER_AXIS and node.attributes.get_int("axis", 0) < 0:
            node.attributes["axis"] = ir.AttrInt64("axis", node.attributes.get_int("axis", 0) + rank)
        if node.op_type in _OVER_AXES and len(node.inputs) > 1:
            given = node.inputs[1]
            tensor = ir.convenience.get_const_tensor(given) if given is not None else None
            axes = [] if tensor is None else tensor.numpy().reshape(-1).tolist()
            if any(axis < 0 for axis in axes):
                _give(graph, node, [axis % rank for axis in axes], "axes")


def plain_transposes(graph: ir.Graph) -> None:
    """Of attention: the keys' last axes are changed over as they are, not as three axes and back; in place.

    The exporter writes eight nodes more, and of no keys at all nothing can be worked out.
    """
    for node in graph.all_nodes():
        if node.op_type != "Reshape" or not is_translation_of(node, "scaled_dot_product_attention"):
            continue
        turned = node.inputs[0].producer() if node.inputs[0] is not None else None
        if turned is None or turned.op_type != "Transpose":
            continue
        merged = turned.inputs[0].producer() if turned.inputs[0] is not None else None
        if (
            merged is None
            or merged.op_type != "Reshape"
            or tuple(turned.attributes["perm"].as_ints()) != (0, 2, 1)
        ):
            continue
        keys = merged.inputs[0]
        if keys is None or keys.shape is None or traced_as(merged) != traced_as(node):
            continue
        before = _last_two_changed(node.outputs[0].shape)
        made = []
        if before is not None and not _may_be_same(keys.shape, before):
            # The exporter joined a reshape of the model's (heads that several queries share) with its own.
            if not all(isinstance(size, int) for size in before):
                continue
            shape = Constants(graph).add(
                ir.tensor(np.array(before, np.int64)), f"{node.outputs[0].name}_shape"
            )
            made.append(ir.node("Reshape", [keys, shape]))
            made[0].outputs[0].shape, made[0].outputs[0].type = ir.Shape(before), keys.type
            keys = made[0].outputs[0]
        assert keys.shape is not None
        rank = len(keys.shape)
        plain = ir.node("Transpose", [keys], {"perm": [*range(rank - 2), rank - 1, rank - 2]})
        result = plain.outputs[0]
        result.name, result.type = node.outputs[0].name, keys.type
        result.shape = ir.Shape(_last_two_changed(keys.shape) or ())
        for each in (*made, plain):
            each.metadata_props.update(node.metadata_props)
        owner = node.graph
        assert owner is not None
        ir.convenience.replace_nodes_and_values(owner, node, [node], [*made, plain], node.outputs, [result])


def _may_be_same(shape: ir.Shape, other: Sequence[int | ir.SymbolicDim]) -> bool:
    """Whether nothing that is known of the sizes tells two shapes apart."""
    return len(shape) == len(other) and all(
        here == there or ir.SymbolicDim(None) in (here, there)
        for here, there in zip(shape, other, strict=True)
    )


def _last_two_changed(shape: ir.Shape | None) -> list[int | ir.SymbolicDim] | None:
    return None if shape is None else [*shape[:-2], shape[-1], shape[-2]]


def _give(graph: ir.Graph, node: ir.Node, numbers: list[int], kind: str) -> None:
    """Numbers as the second input of a node."""
    array = np.array(numbers, dtype=np.int64)
    node.replace_input_with(1, Constants(graph).add(ir.tensor(array), f"{node.outputs[0].name}_{kind}"))
