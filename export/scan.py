"""`write_scans`: the marked loops of a translated model become ONNX `Scan` nodes, in place.

    before   h = State(h0)   x = Element(xs)   …body…   last, ys = End(h, x, h', y)
    after    last, ys = Scan(h0, xs) { (h, x) => (h', y): …body… }

What in the body does not depend on a state or an element stays outside and is computed once; the body reads it, and
the weights, from the graph around it.

Source: https://onnx.ai/onnx/operators/onnx__Scan.html (since opset 16 without sequence lengths)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moe_export.export.loop_body import DOMAIN, ELEMENT, END, STATE
from moe_export.export.scan_inputs import move_inwards


def write_scans(model: ir.Model) -> None:
    """Replace every marked loop, in the order of the graph."""
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == END:
            move_inwards(model.graph, node)
            _write(model.graph, node)
    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(DOMAIN, None)


def _write(graph: ir.Graph, end: ir.Node) -> None:
    states, elements = _integer(end, "states"), _integer(end, "elements")
    marks = [_mark(value) for value in end.inputs[: states + elements]]
    body_nodes = _between(graph, marks, end)
    inputs = [_body_input(mark, place) for place, mark in enumerate(marks)]
    for mark, value in zip(marks, inputs, strict=True):
        mark.outputs[0].replace_all_uses_with(value)
    graph.remove(body_nodes)
    outputs = _body_outputs(end.inputs[states + elements :], body_nodes)
    body = ir.Graph(inputs, outputs, nodes=body_nodes, name=f"loop_{_integer(end, 'loop')}")
    scan = _scan(end, marks, states, body)
    graph.insert_before(end, scan)
    for old, new in zip(end.outputs, scan.outputs, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([end, *marks], safe=False)


def _integer(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())


def _mark(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None
    assert node.domain == DOMAIN
    assert node.op_type in (STATE, ELEMENT)
    return node


def _between(graph: ir.Graph, marks: Sequence[ir.Node], end: ir.Node) -> list[ir.Node]:
    """The nodes that depend on a mark and that the end depends on, in graph order."""
    needed: set[ir.Node] = set()
    stack = [value.producer() for value in end.inputs if value is not None]
    while stack:
        node = stack.pop()
        if node is not None and node not in needed and node not in marks:
            needed.add(node)
            stack += [value.producer() for value in _reads(node)]
    inside: list[ir.Node] = []
    dependent = set(marks)
    for node in graph:
        if node in needed and any(value.producer() in dependent for value in _reads(node)):
            dependent.add(node)
            inside.append(node)
    return inside


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, its subgraphs included."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            values += [value for inner in attribute.as_graph() for value in _reads(inner)]
    return values


def _body_input(mark: ir.Node, place: int) -> ir.Value:
    old = mark.outputs[0]
    kind = "state" if mark.op_type == STATE else "element"
    return ir.Value(name=f"{kind}_{_integer(mark, 'loop')}_{place}", shape=old.shape, type=old.type)


def _body_outputs(results: Sequence[ir.Value | None], nodes: list[ir.Node]) -> list[ir.Value]:
    """A value of its own for every output: inputs, outer values and values given out twice are copied."""
    made = {value for node in nodes for value in node.outputs}
    outputs: list[ir.Value] = []
    for result in results:
        assert result is not None
        value = result
        if value not in made or value in outputs:
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            nodes.append(copy)
            value = copy.outputs[0]
        outputs.append(value)
    return outputs


def _scan(end: ir.Node, marks: Sequence[ir.Node], states: int, body: ir.Graph) -> ir.Node:
    elements = marks[states:]
    collected = len(end.outputs) - states
    axes = list(end.attributes["axes"].as_ints())[:collected]
    backwards = list(end.attributes["backwards"].as_ints())[:collected]
    attributes: dict[str, Any] = {
        "body": body,
        "num_scan_inputs": len(elements),
        "scan_input_axes": [_integer(mark, "axis") for mark in elements],
        "scan_input_directions": [_integer(mark, "backwards") for mark in elements],
    }
    if collected:
        attributes |= {"scan_output_axes": axes, "scan_output_directions": backwards}
    scan = ir.node(
        "Scan",
        [mark.inputs[0] for mark in marks],
        attributes={key: value for key, value in attributes.items() if not _is_default(key, value)},
        num_outputs=len(end.outputs),
    )
    for old, new in zip(end.outputs, scan.outputs, strict=True):
        new.name, new.shape, new.type = old.name, old.shape, old.type
    scan.metadata_props.update(end.metadata_props)
    return scan


def _is_default(key: str, value: object) -> bool:
    """Axes and directions that are all 0 say nothing."""
    return key.startswith("scan_") and isinstance(value, list) and not any(value)
