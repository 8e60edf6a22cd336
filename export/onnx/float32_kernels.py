"""Run a half precision graph where there are no kernels for it: each operator in float32, its results rounded.

onnxruntime's CPU has next to none for bfloat16, and its 1.31 crashes on some float16 graphs while it optimises them.
Every value that the graph says is narrow is rounded to it; only the arithmetic inside one operator is finer, as on a
GPU that sums in float32.
"""

from __future__ import annotations

import onnx_ir as ir

from moe_export.export.onnx.bodies import bodies

NARROW, WIDE = {ir.DataType.BFLOAT16, ir.DataType.FLOAT16}, ir.DataType.FLOAT


def with_float32_kernels(model: ir.Model) -> ir.Model:
    """A copy of a graph in which only `Cast` reads or writes narrow values; they are the same, in the same places."""
    copy = model.clone()
    for graph in (copy.graph, *(body for node in copy.graph.all_nodes() for body in bodies(node))):
        for node in list(graph):
            if node.op_type not in {"Cast", "Constant"} and not _only_hands_on(node):
                _widen(node)
    return copy


def wide_outside(model: ir.Model) -> ir.Model:
    """The graph itself, with inputs and outputs of float32 in place of narrow ones, which NumPy may not have."""
    for index, value in enumerate(model.graph.inputs):
        if value.dtype in NARROW:
            given = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(WIDE))
            cast = _cast(given, value.dtype, f"{value.name}.narrow")
            value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
            model.graph.inputs[index] = given
            model.graph.insert_before(model.graph[0], cast)
    for index, value in enumerate(model.graph.outputs):
        if value.dtype in NARROW:
            cast = _cast(value, WIDE, f"{value.name}.wide")
            model.graph.append(cast)
            model.graph.outputs[index] = cast.outputs[0]
    return model


def _only_hands_on(node: ir.Node) -> bool:
    """Whether it computes nothing itself: it runs bodies, or puts tensors into sequences and takes them out."""
    values = [*node.inputs, *node.outputs]
    return bool(bodies(node)) or any(
        value is not None and value.type is not None and not isinstance(value.type, ir.TensorType)
        for value in values
    )


def _widen(node: ir.Node) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in NARROW:
            cast = _cast(value, WIDE, f"{node.name}.{index}.wide")
            node.prepend(cast)
            node.replace_input_with(index, cast.outputs[0])
    widen_filling(node)
    for value in node.outputs:
        if value.dtype in NARROW:
            narrow, value.type = value.dtype, ir.TensorType(WIDE)
            returned, name = value.is_graph_output(), value.name
            cast = _cast(value, narrow, f"{name}.rounded")
            value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
            if returned:  # it keeps its name outside
                value.name, cast.outputs[0].name = f"{name}.exact", name
            cast.replace_input_with(0, value)
            node.append(cast)


def widen_filling(node: ir.Node) -> None:
    """Let a `ConstantOfShape` fill with float32 in place of a narrow type; nothing is done to any other node."""
    attribute = node.attributes.get("value")
    if node.op_type == "ConstantOfShape" and attribute is not None and attribute.as_tensor().dtype in NARROW:
        tensor = ir.tensor(attribute.as_tensor().numpy().astype("float32"))
        node.attributes["value"] = ir.AttrTensor("value", tensor)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"cast_{name}")
    node.outputs[0].name = name
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    return node
