"""`size_said_to_be_one`: what a condition on one size says; `whole_where_single`: what that makes of a branch.

    n == 1:    x[b, 0:1, d]   is   x[b, n, d]

Letters: b batch, n the size, d width.
"""

from __future__ import annotations

import onnx_ir as ir

from moe_export.export.sizes import same_dim

_MOVES = {"Squeeze", "Reshape", "Identity", "Cast"}
"""From the shape of one axis to its size."""


def size_said_to_be_one(condition: ir.Value) -> ir.SymbolicDim | None:
    """The size that a condition compares with 1; None of any other condition."""
    node = condition.producer()
    if node is None or node.op_type != "Equal":
        return None
    for place in (0, 1):
        if _numbers(node.inputs[1 - place]) == [1]:
            return _size(node.inputs[place])
    return None


def _size(value: ir.Value | None) -> ir.SymbolicDim | None:
    """The size of an unknown axis that a number is; None of any other number."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Shape":
        return None
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    dims = list(source.shape)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)]
    return dims[0] if len(dims) == 1 and isinstance(dims[0], ir.SymbolicDim) else None


def alike_where_single(one: ir.Value, other: ir.Value, single: ir.SymbolicDim | None) -> bool:
    """Whether two values have the same sizes if a size is 1; the first of them may have been written for that.

    Args:
        one: A value of this case alone.
        other: A value of all cases.
        single: The size; None if there is none.
    """
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        return False
    pairs = zip(one.shape, other.shape, strict=True)
    return all(same_dim(a, b) or (a == 1 and single is not None and same_dim(b, single)) for a, b in pairs)


def whole_where_single(branch: ir.Graph, single: ir.SymbolicDim) -> None:
    """Leave out the slices of a branch that take the first entry of an axis, which has no other there; in place."""
    for node in list(branch):
        source = node.inputs[0] if node.op_type == "Slice" and node.domain == "" else None
        if source is None or source.shape is None or source in branch.outputs:
            continue
        bounds = [_numbers(value) for value in node.inputs[1:]]
        if len(bounds) < 3 or bounds[:2] != [[0], [1]] or bounds[2] is None or bounds[3:] not in ([], [[1]]):
            continue
        if same_dim(source.shape[bounds[2][0]], single) and node.outputs[0] not in branch.outputs:
            node.outputs[0].replace_all_uses_with(source)
            branch.remove(node, safe=True)


def _numbers(value: ir.Value | None) -> list[int] | None:
    """The integers that a constant holds; None of any other value."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.dtype != ir.DataType.INT64 or tensor.size > 1:
        return None
    return [int(number) for number in tensor.numpy().reshape(-1)]
