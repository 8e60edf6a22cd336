"""From the exporter's opset 18 down to 17, operator by operator; what cannot go is refused with its line.

torch's exporter writes opset 18 at the lowest. Between 17 and 18 nineteen operators changed; each rule below
states what it does to one of them. An operator of 18 that no rule takes and 17 does not have stops the export:
asking for 17 never yields a file that only says 17.

Source: https://github.com/onnx/onnx/blob/main/docs/Changelog.md (versions 17 and 18)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from moe_export.errors import Code, NotExportableError, UsageError
from moe_export.export.onnx.counted_sizes import without_counted
from moe_export.export.onnx.provenance import source_location
from moe_export.graph_builder import Constants

LOWEST = 17
EXPORTER_LOWEST = 18

_REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSumSquare",
}  # fmt: skip


def highest_opset() -> int:
    """The newest opset that the installed onnx and onnxruntime both have."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for opset in range(onnx.defs.onnx_opset_version(), LOWEST - 1, -1):
        text = f'<ir_version: 8, opset_import: ["":{opset}]> g (float[1] x) => (float[1] y) {{ y = Relu(x) }}'
        try:
            onnxruntime.InferenceSession(
                onnx.parser.parse_model(text).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception:
            continue
        return opset
    return LOWEST


def check_opset(opset: int) -> None:
    """Refuse an opset that cannot be written.

    Raises:
        UsageError: It is below 17 or above what onnx and onnxruntime have.
    """
    highest = highest_opset()
    if not LOWEST <= opset <= highest:
        raise UsageError(
            f"opset {opset} is out of range",
            hint=f"choose {LOWEST} to {highest}, the newest that the installed onnx and onnxruntime both have",
        )


def ir_version_for(opset: int) -> int:
    """The lowest ONNX IR version that carries this opset, so that runtimes of its day read the file."""
    versions = [int(row[1]) for row in onnx.helper.VERSION_TABLE if int(row[2]) == opset]
    return min(versions, default=10)


def set_opset(model: ir.Model, opset: int) -> None:
    """Bring a model of the exporter to `opset`, in place.

    Raises:
        NotExportableError: An operator has no form there; names it and the line of the model.
    """
    written = model.opset_imports.get("", 0)
    if opset == LOWEST and written == EXPORTER_LOWEST:
        nodes = list(model.graph.all_nodes())
        if any(_lacks_sizes(node) for node in nodes):
            _infer_sizes(model, nodes)
        for node in nodes:
            if node.domain in ("", "ai.onnx"):
                _lower(node)
        model.opset_imports[""] = LOWEST
        for function in model.functions.values():
            function.opset_imports[""] = (
                LOWEST  # of the operators that `experts/trt_moe` writes in it, both have one form
            )
        _require_known(model)
    elif written != opset:
        raise NotExportableError(
            f"the graph could not be converted from opset {written} to {opset}",
            code=Code.OPSET,
            hint=f"try --opset {written}, or 17",
        )
    model.ir_version = ir_version_for(opset)


def _lacks_sizes(node: ir.Node) -> bool:
    """Whether a rule needs the shape of an operand, and nobody noted it, as in rewritten blocks."""
    value = node.inputs[0] if node.op_type in ("Split", "Pad") else None
    if value is None:
        return False
    return value.shape is None or any(
        not isinstance(size, int) and size.value is None for size in value.shape
    )


def _infer_sizes(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    """Note the shapes that such nodes lack. Of a copy: in place, the pass takes a sequence for a tensor."""
    inferred = ShapeInferencePass()(model.clone()).model
    for node, twin in zip(nodes, inferred.graph.all_nodes(), strict=True):
        value, known = node.inputs[0] if node.inputs else None, twin.inputs[0] if twin.inputs else None
        if value is not None and known is not None and _lacks_sizes(node):
            value.shape = without_counted(known.shape.copy()) if known.shape is not None else None
            value.type = value.type or known.type


def _lower(node: ir.Node) -> None:
    if node.op_type in _REDUCTIONS:
        _reduction(node)
    elif node.op_type in _RULES:
        _RULES[node.op_type](node)


def _reduction(node: ir.Node) -> None:
    """Axes as an input (18) → as an attribute (17)."""
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is not None:
        node.attributes["axes"] = ir.AttrInt64s("axes", _constant(axes, node).reshape(-1).tolist())
        node.resize_inputs(1)
    elif _int(node, "noop_with_empty_axes", 0):
        node.attributes.clear()
        node.op_type = "Identity"
        return
    node.attributes.pop("noop_with_empty_axes", None)


def _split(node: ir.Node) -> None:
    """`num_outputs` (18) → nothing if the parts are equal, else a constant input with the sizes (17)."""
    if node.attributes.pop("num_outputs", None) is None or (
        len(node.inputs) > 1 and node.inputs[1] is not None
    ):
        return
    value = node.inputs[0]
    axis = _int(node, "axis", 0)
    size = value.shape[axis] if value is not None and value.shape is not None else None
    parts = len(node.outputs)
    if not isinstance(size, int):
        raise _refusal(node, "splits a dimension of unknown size")
    if size % parts:
        whole = -(-size // parts)
        sizes = np.array([whole] * (parts - 1) + [size - whole * (parts - 1)], dtype=np.int64)
        node.resize_inputs(2)
        node.replace_input_with(1, _beside(node, sizes, "split"))


def _pad(node: ir.Node) -> None:
    """`axes` (18) → pads for every axis (17)."""
    if len(node.inputs) < 4 or node.inputs[3] is None:
        if node.attributes.get("mode") is not None and node.attributes["mode"].as_string() == "wrap":
            raise _refusal(node, "wraps around, which opset 17 cannot")
        return
    value = node.inputs[0]
    if value is None or value.shape is None:
        raise _refusal(node, "pads a tensor of unknown rank")
    rank = len(value.shape)
    axes = [int(axis) % rank for axis in _constant(node.inputs[3], node)]
    given = _constant(node.inputs[1], node)
    pads = np.zeros(2 * rank, dtype=np.int64)
    for index, axis in enumerate(axes):
        pads[axis], pads[rank + axis] = given[index], given[len(axes) + index]
    node.replace_input_with(1, _beside(node, pads, "pads"))
    node.resize_inputs(3)


def _scatter(node: ir.Node) -> None:
    reduction = node.attributes.get("reduction")
    if reduction is not None and reduction.as_string() in ("max", "min"):
        raise _refusal(node, f"reduces by {reduction.as_string()!r}, which came with opset 18")


def _resize(node: ir.Node) -> None:
    """Drop the attributes of 18 where they have the values that 17 always means."""
    if _int(node, "antialias", 0) or node.attributes.get("axes") is not None:
        raise _refusal(node, "uses antialias or axes, which came with opset 18")
    for name in ("antialias", "keep_aspect_ratio_policy"):
        node.attributes.pop(name, None)


def _bitwise(node: ir.Node) -> None:
    """On bool tensors a bitwise operator is the logical one, which 17 has."""
    first = node.inputs[0]
    if first is None or first.dtype != ir.DataType.BOOL:
        raise _refusal(node, "works on the bits of integers, which came with opset 18")
    node.op_type = node.op_type.removeprefix("Bitwise")


def _mish(node: ir.Node) -> None:
    """Mish(x) → x * tanh(softplus(x))."""
    softplus = ir.node("Softplus", [node.inputs[0]])
    tanh = ir.node("Tanh", [softplus.outputs[0]])
    product = ir.node("Mul", [node.inputs[0], tanh.outputs[0]])
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], [softplus, tanh, product], node.outputs, product.outputs
    )


_RULES: dict[str, Callable[[ir.Node], None]] = {
    "Split": _split,
    "Pad": _pad,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
    "Resize": _resize,
    "BitwiseAnd": _bitwise,
    "BitwiseOr": _bitwise,
    "BitwiseXor": _bitwise,
    "BitwiseNot": _bitwise,
    "Mish": _mish,
}


def _require_known(model: ir.Model) -> None:
    """Every operator left must exist at 17, in the version that the graph was written for."""
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            continue
        try:
            onnx.defs.get_schema(node.op_type, LOWEST, "")
        except onnx.defs.SchemaError:
            raise _refusal(node, "came after opset 17") from None


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def _constant(value: ir.Value | None, node: ir.Node) -> np.ndarray:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None:
        raise _refusal(node, "takes axes or sizes that are computed at run time, which opset 17 cannot")
    return np.asarray(tensor.numpy())


def _beside(node: ir.Node, array: np.ndarray, kind: str) -> ir.Value:
    """A constant where the node stands."""
    assert node.graph is not None
    return Constants(node.graph).add(ir.tensor(array), f"{node.outputs[0].name}_{kind}")


def _refusal(node: ir.Node, why: str) -> NotExportableError:
    return NotExportableError(
        f"operator {node.op_type} {why}",
        code=Code.OPSET,
        where=source_location(node),
        hint="export with --opset 18 or newer",
    )
