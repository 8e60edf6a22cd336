"""`drop_expands`: an `Expand` that only repeats what the operators behind it would repeat by themselves.

    y = Div(x, Expand(norm, Shape(x)))   →   y = Div(x, norm)

PyTorch's decompositions write such (`F.normalize`): four nodes and a copy as large as x.
ONNX's element-wise operators broadcast as torch's do: https://onnx.ai/onnx/repo-docs/Broadcasting.html
"""

from __future__ import annotations

import onnx_ir as ir

from moe_export.export.sizes import same_dim

_BROADCASTING = {
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod",
    "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor",
}  # fmt: skip


def drop_expands(graph: ir.Graph) -> None:
    """Let the operators behind each `Expand` broadcast, where every one of them gives the same shape so; in place."""
    for node in graph.all_nodes():
        if node.op_type != "Expand" or node.domain:
            continue
        small, large = node.inputs[0], node.outputs[0]
        users = [user for user, _ in large.uses()]
        if small is None or not users or large.is_graph_output():
            continue
        if all(_broadcasts(user, small, large) for user in users):
            large.replace_all_uses_with(small)


def _broadcasts(user: ir.Node, small: ir.Value, large: ir.Value) -> bool:
    """Whether the other operands have every size that the small value lacks."""
    if user.op_type not in _BROADCASTING or user.domain or small.shape is None or large.shape is None:
        return False
    shapes = [small.shape]
    for value in user.inputs:
        if value is None or value.shape is None:
            return False
        shapes += [value.shape] if value is not large else []
    if max(len(shape) for shape in shapes) < len(large.shape):
        return False
    for place, size in enumerate(reversed(list(large.shape))):
        here = [_size(shape, place) for shape in shapes]
        if not any(same_dim(size, other) for other in here) or not all(map(_is_known, here)):
            return False
    return True


def _size(shape: ir.Shape, place: int) -> int | ir.SymbolicDim:
    """A size counted from the last; 1 where there is none."""
    return shape[len(shape) - 1 - place] if place < len(shape) else 1


def _is_known(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, int) or size.value is not None
