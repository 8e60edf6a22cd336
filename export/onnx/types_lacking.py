"""`in_float32`: operators that ONNX does not have in the narrow type of their inputs compute in float32, between casts.

    TopK(x: bfloat16)   →   Cast(TopK(Cast(x))): bfloat16

At opset 17, ONNX has no bfloat16 for top-k, cumulative sums, convolutions and some activations. float32 holds every
number of the narrow types, so what is chosen is the same, and what is computed is rounded once, as PyTorch does.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from moe_export.export.onnx.float32_kernels import widen_filling
from moe_export.graph_builder import GraphBuilder

_NARROW = {ir.DataType.BFLOAT16: "tensor(bfloat16)", ir.DataType.FLOAT16: "tensor(float16)"}


def in_float32(model: ir.Model, opset: int) -> int:
    """Put casts around such operators, in place.

    Args:
        model: The graph, with types.
        opset: The version of ONNX's operators that it will have.

    Returns:
        How many there were.
    """
    found, current = 0, model.opset_imports.get("", opset)
    nodes = list(model.graph.all_nodes())
    if not any(value.dtype in _NARROW for node in nodes for value in (*node.inputs, *node.outputs) if value):
        return 0
    for node in nodes:
        _settle_types(node, current)
        kinds = _lacking(node, opset)
        if kinds:
            found += 1
            _widen(node, kinds, opset)
    return found


def _widen(node: ir.Node, kinds: set[str], opset: int) -> None:
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    write = GraphBuilder.in_front_of(node, str(node.name))
    widen_filling(node)
    for index, (value, kind) in enumerate(with_kinds(node.inputs, schema.inputs)):
        if value is not None and kind in kinds and value.dtype in _NARROW:
            wide = write.op("Cast", value, to=ir.DataType.FLOAT)
            wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            node.replace_input_with(index, wide)
    for value, kind in with_kinds(node.outputs, schema.outputs):
        if value is None or kind not in kinds or value.dtype not in _NARROW:
            continue
        narrow = ir.node("Cast", [value], {"to": int(value.dtype)}, name=f"{node.name}_{value.name}_cast")
        made = narrow.outputs[0]
        made.type, made.shape = value.type, value.shape
        value.replace_all_uses_with(made, replace_graph_outputs=True)
        narrow.replace_input_with(0, value)
        made.name, value.name = value.name, f"{value.name}.float"
        value.type = ir.TensorType(ir.DataType.FLOAT)
        narrow.metadata_props.update(node.metadata_props)
        node.append(narrow)


def _settle_types(node: ir.Node, opset: int) -> None:
    """Give outputs that have no type yet the one that the inputs have where ONNX says that both are the same.

    Args:
        node: As it was translated.
        opset: The version that it was translated for: which input has which type differs between versions.
    """
    if node.domain not in {"", "ai.onnx"} or not onnx.defs.has(node.op_type, opset, ""):
        return
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    known = {kind: value.type for value, kind in with_kinds(node.inputs, schema.inputs) if value is not None}
    for value, kind in with_kinds(node.outputs, schema.outputs):
        if value is not None and value.type is None and node.op_type != "Cast":
            value.type = known.get(kind)
        elif value is not None and value.type is None:
            value.type = ir.TensorType(ir.DataType(node.attributes["to"].as_int()))


def _lacking(node: ir.Node, opset: int) -> set[str]:
    """The type parameters that stand for a narrow type in a node, and may not."""
    if node.domain not in {"", "ai.onnx"} or not onnx.defs.has(node.op_type, opset, ""):
        return set()
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    allowed = {rule.type_param_str: set(rule.allowed_type_strs) for rule in schema.type_constraints}
    pairs = [*with_kinds(node.inputs, schema.inputs), *with_kinds(node.outputs, schema.outputs)]
    return {
        kind
        for value, kind in pairs
        if value is not None and value.dtype in _NARROW and kind in allowed
        if _NARROW[value.dtype] not in allowed[kind] and "tensor(float)" in allowed[kind]
    }


def with_kinds(
    values: Sequence[ir.Value | None], formal: Sequence[onnx.defs.OpSchema.FormalParameter]
) -> list[tuple[ir.Value | None, str]]:
    """Values with the type parameters that stand for them; of the last one, if it is variadic, all that are left."""
    if formal and formal[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
        formal = [*formal, *[formal[-1]] * (len(values) - len(formal))]
    return [(value, each.type_str) for value, each in zip(values, formal, strict=False)]
