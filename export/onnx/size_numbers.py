"""Numbers that Python computes from sizes, in the precision that Python computes them in.

A capacity is `int(1.05 * n / 4)`. Python computes it in float64 and the exporter's graph in float32, so that of 240
tokens an expert takes 62 in the one and 63 in the other. The nodes that compute such a number are moved to float64;
where a tensor is computed with it, it is rounded to float32 as before.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import onnx_ir as ir

from moe_export.export.torch_compat.metadata import computes_number, numbers_in


def exact_sizes(graph: ir.Graph) -> None:
    """Move what computes numbers from sizes to float64, in place. The graph is as the exporter wrote it first."""
    moved: dict[ir.Value, None] = {}
    computing = [node for node in graph if computes_number(node)]
    for node in computing:
        given = _widened(node) if node.op_type == "Constant" else _moved(graph, node, moved)
        moved.update(dict.fromkeys(given))
    for value in moved:
        _round_for_others(graph, value, set(computing))


def _widened(node: ir.Node) -> list[ir.Value]:
    """A constant of float32 as the number that it was rounded from."""
    exact = _exact(node, node)
    if exact is None:
        return []
    node.attributes["value"] = ir.AttrTensor("value", exact)
    return _doubles(node)


def _exact(constant: ir.Node | None, reader: ir.Node) -> ir.TensorProtocol | None:
    """A constant of float32 in float64, as the number that its reader was written with; None if it is none."""
    known = constant is not None and constant.op_type == "Constant" and "value" in constant.attributes
    tensor = constant.attributes["value"].as_tensor() if constant is not None and known else None
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape):
        return None
    number = float(tensor.numpy())
    exact = next((each for each in numbers_in(reader) if np.float32(each) == np.float32(number)), number)
    return ir.tensor(np.array(exact, dtype=np.float64))


def _moved(graph: ir.Graph, node: ir.Node, moved: Container[ir.Value | None]) -> list[ir.Value]:
    """A node that computes a number: its operands of float32 are widened, and so is what it gives."""
    if node.op_type == "Cast":
        if node.attributes.get_int("to", 0) != ir.DataType.FLOAT:
            return []
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.DOUBLE)
    elif not any(value in moved or _is_float(value) for value in node.inputs):
        return []
    for index, value in enumerate(node.inputs):
        if value is None or value in moved:
            continue
        exact = _exact(value.producer(), node)
        if exact is not None:  # one that tensors are computed with, too, and that stays as it is for them
            own = ir.node("Constant", [], {"value": exact}, metadata_props=dict(node.metadata_props))
            own.outputs[0].shape, own.outputs[0].type = ir.Shape([]), ir.TensorType(ir.DataType.DOUBLE)
            graph.insert_before(node, own)
            node.replace_input_with(index, own.outputs[0])
        elif _is_float(value):
            widened = _cast(value, ir.DataType.DOUBLE)
            graph.insert_before(node, widened)
            node.replace_input_with(index, widened.outputs[0])
    return _doubles(node)


def _doubles(node: ir.Node) -> list[ir.Value]:
    """The results of a node that were of float32, or that nobody noted a type of; now they are of float64."""
    results = [value for value in node.outputs if value.dtype in (None, ir.DataType.FLOAT)]
    for value in results:
        value.type = ir.TensorType(ir.DataType.DOUBLE)
    return results


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _round_for_others(graph: ir.Graph, value: ir.Value, computing: Container[ir.Node]) -> None:
    """A number of float64, in float32 for the nodes that compute tensors with it."""
    uses = [use for use in value.uses() if use.node not in computing and use.node.op_type != "Cast"]
    places = [index for index, output in enumerate(graph.outputs) if output is value]
    producer = value.producer()
    if producer is not None and (uses or places):
        rounded = _cast(value, ir.DataType.FLOAT)
        graph.insert_after(producer, rounded)
        for use in uses:
            use.node.replace_input_with(use.idx, rounded.outputs[0])
        for index in places:
            graph.outputs[index] = rounded.outputs[0]


def _cast(value: ir.Value, kind: ir.DataType) -> ir.Node:
    """The node that gives a number in another type."""
    node = ir.node("Cast", [value], {"to": kind})
    node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(kind)
    producer = value.producer()
    if producer is not None:
        node.metadata_props.update(producer.metadata_props)
    return node
