"""`mend_products`: products of what was transposed, in forms that ONNX Runtime computes right.

    Transpose(x, [1, 2, 0]) → Cast → MatMul(·, y)     becomes    Cast(x) → Transpose([1, 2, 0]) → MatMul(·, y)
    MatMul(Transpose(x, [0, 2, 1]), v)                becomes    MatMul(v, x)                      of a vector v

ONNX Runtime (1.31) draws a transpose, and a cast behind it, into the product. Where there is a cast, the transpose
moves the first axis and the operands have different ranks (`mask.permute(1, 2, 0).type_as(x) @ x`), that ends in
SIGSEGV, and the process is gone; and of a matrix and a vector (`x.transpose(1, 2) @ v`, `m.T @ v`) it gives other
numbers. A cast changes elements one by one, so it may as well come first; and (xᵀ v)ᵢ = Σⱼ xⱼᵢ vⱼ = (v x)ᵢ.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

MENDED = "moe_export.mended"
"""In a node's metadata: what was changed at this place, and why."""
_CAST = "onnxruntime crashes on Transpose, Cast, MatMul; the cast comes first"
_VECTOR = "onnxruntime is wrong for a transposed matrix and a vector; they change places"


def mend_products(model: ir.Model) -> None:
    """Change every such place of a model, in place, those in the bodies of loops included."""
    for node in [*model.graph.all_nodes()]:
        if node.op_type == "MatMul" and not node.domain:
            _mend(node)


def product_notes(model: ir.Model) -> list[str]:
    """What the report says of it."""
    found = [node.metadata_props[MENDED] for node in model.graph.all_nodes() if MENDED in node.metadata_props]
    return [f"{why} ({found.count(why)} x)" for why in dict.fromkeys(found)]


@dataclass(frozen=True)
class _Transposed:
    """An operand that is transposed, and perhaps cast then."""

    transpose: ir.Node
    cast: ir.Node | None
    order: tuple[int, ...]

    @property
    def source(self) -> ir.Value:
        """What is transposed."""
        assert self.transpose.inputs[0] is not None
        return self.transpose.inputs[0]

    @property
    def swaps_last_two(self) -> bool:
        """Whether the other axes stay where they are."""
        rank = len(self.order)
        return self.order == (*range(rank - 2), rank - 1, rank - 2)


def _mend(product: ir.Node) -> None:
    left, right = (_turned(value) for value in product.inputs)
    vector = product.inputs[1]
    is_vector = vector is not None and vector.shape is not None and len(vector.shape) == 1
    if left is not None and left.swaps_last_two and vector is not None and is_vector:
        _change_places(product, left, vector)
        return
    for turned in (left, right):
        if turned is not None and turned.cast is not None and len(turned.order) > 2 and turned.order[0] != 0:
            _cast_first(turned, turned.cast)


def _turned(value: ir.Value | None) -> _Transposed | None:
    """The transpose behind an operand; None for another graph's, which no body draws into its products."""
    node = value.producer() if value is not None else None
    cast = node if node is not None and node.op_type == "Cast" and not node.domain else None
    if cast is not None:
        node = cast.inputs[0].producer() if cast.inputs[0] is not None else None
        if node is None or node.graph is not cast.graph:
            return None
    if node is None or node.op_type != "Transpose" or node.domain or node.inputs[0] is None:
        return None
    order = node.attributes.get("perm")
    if order is not None:
        return _Transposed(node, cast, tuple(order.as_ints()))
    shape = node.inputs[0].shape
    return None if shape is None else _Transposed(node, cast, tuple(reversed(range(len(shape)))))


def _cast_of(turned: _Transposed, cast: ir.Node) -> ir.Node:
    """The cast, of what was not transposed yet."""
    node = ir.node("Cast", [turned.source], dict(cast.attributes), name=cast.name)
    node.outputs[0].shape, node.outputs[0].type = turned.source.shape, cast.outputs[0].type
    node.metadata_props.update(cast.metadata_props)
    return node


def _cast_first(turned: _Transposed, cast: ir.Node) -> None:
    """Cast, then transpose; the old transpose stays for its other readers."""
    first = _cast_of(turned, cast)
    name = f"{cast.name}_transpose" if cast.name else None
    then = ir.node("Transpose", first.outputs, dict(turned.transpose.attributes), name=name)
    then.metadata_props.update(turned.transpose.metadata_props | {MENDED: _CAST})
    _replace(cast, [first, then])
    _remove_unread(turned.transpose)


def _change_places(product: ir.Node, turned: _Transposed, vector: ir.Value) -> None:
    """The vector from the left."""
    before = [] if turned.cast is None else [_cast_of(turned, turned.cast)]
    matrix = before[0].outputs[0] if before else turned.source
    node = ir.node("MatMul", [vector, matrix], name=product.name)
    node.metadata_props.update(product.metadata_props | {MENDED: _VECTOR})
    _replace(product, [*before, node])
    for left in (turned.cast, turned.transpose):
        if left is not None:
            _remove_unread(left)


def _replace(node: ir.Node, new: list[ir.Node]) -> None:
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, new[-1].outputs)


def _remove_unread(node: ir.Node) -> None:
    if node.graph is not None and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
        node.graph.remove(node, safe=True)
