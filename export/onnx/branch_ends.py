"""`shared_ends`: what both branches of an `If` begin or end with is computed once, in front of it or behind it.

    before   y = If(c, then: f(MatMul(x, u)) w, else: g(MatMul(x, u)) w)
    after    p = MatMul(x, u)    q = If(c, then: f(p), else: g(p))    y = q w

A runtime keeps a copy of a weight, laid out for its product, for each node that reads it: products stand once.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from moe_export.export.onnx.bodies import bodies


def shared_ends(graph: ir.Graph, node: ir.Node) -> None:
    """Move the nodes that both branches share out of them, in place.

    Args:
        graph: Where the `If` is.
        node: The `If`.
    """
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    _heads(graph, node, *branches)
    for place in range(len(node.outputs)):
        while _tail(graph, node, place, *branches):
            pass


def _heads(graph: ir.Graph, node: ir.Node, one: ir.Graph, other: ir.Graph) -> None:
    inside = {value for branch in (one, other) for each in branch for value in each.outputs}
    kept = {*one.outputs, *other.outputs}
    known: dict[Hashable, ir.Node] = {}
    for each in list(other):
        # A node of the other branch can only move if what it reads is outside once its own sources have moved.
        known.setdefault(_key(each), each)
    for each in list(one):
        counterpart = known.get(_key(each))
        if (
            counterpart is None
            or not inside.isdisjoint(each.inputs)
            or not kept.isdisjoint((*each.outputs, *counterpart.outputs))
        ):
            continue
        other.remove(counterpart)
        graph.insert_before(node, counterpart)
        inside.difference_update(counterpart.outputs)
        for value, same in zip(each.outputs, counterpart.outputs, strict=True):
            value.replace_all_uses_with(same)
        one.remove(each, safe=True)
        for later in other:  # their keys name what was moved, as those of this branch now do
            known.setdefault(_key(later), later)


def _tail(graph: ir.Graph, node: ir.Node, place: int, one: ir.Graph, other: ir.Graph) -> bool:
    """Move the last node of both branches behind the `If`; whether there was one that both share."""
    last, counterpart = (branch.outputs[place].producer() for branch in (one, other))
    if (
        last is None
        or counterpart is None
        or last not in one
        or counterpart not in other
        or _alone(last) != _alone(counterpart)
    ):
        return False
    for branch, each in ((one, last), (other, counterpart)):
        if (
            len(each.outputs) != 1
            or each.outputs[0].uses()
            or list(branch.outputs).count(each.outputs[0]) != 1
        ):
            return False
    made = [{value for each in branch for value in each.outputs} for branch in (one, other)]
    inner = [
        at
        for at, pair in enumerate(zip(last.inputs, counterpart.inputs, strict=True))
        if pair[0] is not pair[1]
    ]
    if len(inner) != 1:
        return False
    sources = last.inputs[inner[0]], counterpart.inputs[inner[0]]
    if any(
        source not in inside or source in branch.outputs
        for source, inside, branch in zip(sources, made, (one, other), strict=True)
    ):
        return False
    result, value = node.outputs[place], sources[1]
    assert value is not None
    assert sources[0] is not None
    one.outputs[place], other.outputs[place] = sources[0], value
    one.remove(last)
    other.remove(counterpart)
    name, result.name = result.name, f"{value.name}.either"
    counterpart.replace_input_with(inner[0], result)
    moved = counterpart.outputs[0]
    moved.shape, moved.type = result.shape, result.type
    graph.insert_after(node, counterpart)
    result.replace_all_uses_with(moved, replace_graph_outputs=True)
    counterpart.replace_input_with(inner[0], result)
    moved.name = name
    result.shape, result.type = value.shape, value.type
    return True


def _alone(node: ir.Node) -> Hashable:
    """What a node computes, whatever it is given."""
    if bodies(node):
        return node
    attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
    return node.domain, node.op_type, node.overload, attributes, len(node.inputs), len(node.outputs)


def _key(node: ir.Node) -> Hashable:
    return _alone(node), tuple(node.inputs)
