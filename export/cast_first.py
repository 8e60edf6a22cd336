"""`cast_first`: a cast of what was transposed, before a product, becomes a transpose of what was cast.

    Transpose(x, [1, 2, 0]) → Cast → MatMul    becomes    Cast(x) → Transpose([1, 2, 0]) → MatMul

`mask.permute(1, 2, 0).type_as(x) @ x`. ONNX Runtime (1.31) draws the transpose and the cast into the product. Where the
transpose moves the first axis, and the other operand is a matrix, that ends in SIGSEGV, and the process is gone. A cast
changes elements one by one, so it may as well come first, and that ONNX Runtime handles.
"""

from __future__ import annotations

import onnx_ir as ir

CAST_FIRST = "moe_export.cast_first"
"""In a node's metadata: that it stands behind its cast, and why."""
_WHY = "onnxruntime crashes on Transpose, Cast, MatMul"


def cast_first(model: ir.Model) -> int:
    """Change every such place of a model, in place, those in the bodies of loops included; how many there were."""
    places = [
        place for node in model.graph.all_nodes() for place in [_transpose_of(node)] if place is not None
    ]
    for transpose, cast in places:
        _swap(transpose, cast)
    return len(places)


def cast_notes(model: ir.Model) -> list[str]:
    """What the report says of it."""
    count = sum(CAST_FIRST in node.metadata_props for node in model.graph.all_nodes())
    where = "one place" if count == 1 else f"{count} places"
    return [f"cast before it is transposed, in {where}: {_WHY}"] if count else []


def _transpose_of(cast: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The transpose that a cast reads, if both would be drawn into a product."""
    if cast.op_type != "Cast" or cast.domain or cast.inputs[0] is None:
        return None
    if not any(use.node.op_type == "MatMul" and not use.node.domain for use in cast.outputs[0].uses()):
        return None
    transpose = cast.inputs[0].producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.domain:
        return None
    if transpose.graph is not cast.graph:  # a body that reads the transpose of the graph around it
        return None
    order = transpose.attributes.get("perm")
    # Without an order, all axes are reversed; two axes have no first one that a product would go over in batches.
    rank = len(order.as_ints()) if order is not None else len(transpose.inputs[0].shape or ())  # type: ignore[union-attr]
    moved = order is None or order.as_ints()[0] != 0
    return (transpose, cast) if moved and rank > 2 else None


def _swap(transpose: ir.Node, cast: ir.Node) -> None:
    """Cast the transpose's operand, and transpose that, in the cast's place; the old one stays for other readers."""
    source, result = transpose.inputs[0], cast.outputs[0]
    assert source is not None
    graph = cast.graph
    assert graph is not None
    first = ir.node("Cast", [source], dict(cast.attributes), name=cast.name)
    value = first.outputs[0]
    value.shape, value.type = source.shape, result.type
    name = f"{cast.name}_transpose" if cast.name else None
    then = ir.node("Transpose", [value], dict(transpose.attributes), name=name)
    then.metadata_props.update(transpose.metadata_props | {CAST_FIRST: _WHY})
    first.metadata_props.update(cast.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, cast, [cast], [first, then], [result], then.outputs)
    if not transpose.outputs[0].uses() and not transpose.outputs[0].is_graph_output():
        assert transpose.graph is not None
        transpose.graph.remove(transpose, safe=True)
