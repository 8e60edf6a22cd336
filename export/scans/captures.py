"""`captures_as_states`: what the body of a `Scan` reads from the graph around it becomes a state that stays the same.

    before   last, ys = Scan(h0, xs) { (h, x) => (h', y): … a … }                 a is computed outside
    after    last, _, ys = Scan(h0, a, xs) { (h, a_in, x) => (h', a_in, y): … a_in … }

OpenVINO (2026.4) counts such a value among the Scan's inputs and refuses it; constants it reads. A `Loop` may read what
it likes. Elsewhere a state costs a copy a step, so this is done for OpenVINO only.
"""

from __future__ import annotations

import onnx_ir as ir

from moe_export.export.onnx.bodies import reads, with_inner
from moe_export.graph_builder import Names


def captures_as_states(model: ir.Model) -> int:
    """Rewrite every `Scan` of a model, outer ones first, in place.

    Returns:
        How many were rewritten.
    """
    names = Names({value.name or "" for node in model.graph.all_nodes() for value in node.outputs})
    count = 0
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Scan"]:
        body = node.attributes["body"].as_graph()
        captured = [value for value in _read_from_outside(body) if value.const_value is None]
        if captured:
            _rewrite(node, body, captured, names)
            count += 1
    return count


def _read_from_outside(body: ir.Graph) -> list[ir.Value]:
    """What a body, or a body in it, reads of the graphs around it."""
    own = {*body.inputs, *body.initializers.values(), *(value for node in body for value in node.outputs)}
    return list(dict.fromkeys(value for node in body for value in reads(node) if value not in own))


def _rewrite(node: ir.Node, body: ir.Graph, captured: list[ir.Value], names: Names) -> None:
    states = len(node.inputs) - node.attributes["num_scan_inputs"].as_int()
    inside, kept = [], []
    for value in captured:
        state = ir.Value(name=names.fresh(f"{value.name}.state"), type=value.type, shape=value.shape)
        same = ir.node("Identity", [state], metadata_props=dict(node.metadata_props))
        same.outputs[0].name, same.outputs[0].type = names.fresh(f"{value.name}.kept"), value.type
        same.outputs[0].shape = value.shape
        for one in list(body):
            for each in with_inner(one):
                for place, given in enumerate(each.inputs):
                    if given is value:
                        each.replace_input_with(place, state)
        body.append(same)
        inside.append(state)
        kept.append(same.outputs[0])
    body.inputs[states:states] = inside
    body.outputs[states:states] = kept
    new = ir.Node(
        node.domain,
        node.op_type,
        [*node.inputs[:states], *captured, *node.inputs[states:]],
        list(node.attributes.values()),
        num_outputs=len(node.outputs) + len(captured),
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    results = [*new.outputs[:states], *new.outputs[states + len(captured) :]]
    for value, unused in zip(captured, new.outputs[states:], strict=False):
        unused.name, unused.type, unused.shape = names.fresh(f"{value.name}.last"), value.type, value.shape
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [new], node.outputs, results)
