"""`sides_in_branches`: what only one side of a decision needs is computed only where that side is taken.

    Where(c, f(x), g(x))          If(c, then: f(x), else: g(x))          for a c of one element

A decision on values is traced both ways (`tracing/decisions`), and both ways are in the graph, joined by `Where`. Nodes
whose results nothing reads but one side of such nodes move into a branch of an `If`. Several `Where` of one condition
are one `If`, as far as none of them needs the other's result. What both sides need stays in front of it, computed once.

Optimizers do nothing across the border of a branch, and small sides save less than a microsecond of a row, so a side
must hold a loop or products with at least `LEAST` weights for it: `tests/bench/test_sides_bench.py`.

Source: https://onnx.ai/onnx/operators/onnx__If.html (operands are equal in shape in both branches here, as `Where` asks
without broadcasting).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from moe_export.export.onnx.bodies import bodies, reads, with_inner
from moe_export.export.onnx.branch_ends import shared_ends
from moe_export.export.onnx.single_size import alike_where_single, size_said_to_be_one, whole_where_single

LEAST = 4096
"""Weights of the products on a side for which an `If` is written."""

_PRODUCTS = {"MatMul": 1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1, "MatMulInteger": 1, "MatMulNBits": 1}
_LOOPS = {"Scan", "Loop"}


@dataclass(frozen=True)
class _Decision:
    """The `Where` nodes that become one `If`, and the nodes that only one side of them needs.

    Attributes:
        joins: In the order of the graph.
        sides: Those of the true side and of the false one, in the order of the graph.
    """

    joins: list[ir.Node]
    sides: tuple[list[ir.Node], list[ir.Node]]


def sides_in_branches(model: ir.Model) -> int:
    """Move the nodes of costly sides into branches, in place.

    Returns:
        How many `If` nodes there are now that were not there before.
    """
    return sum(_rewrite(graph) for graph in [model.graph, *_inner(model.graph)])


def _inner(graph: ir.Graph) -> list[ir.Graph]:
    return [body for node in graph for each in with_inner(node) for body in bodies(each)]


def _rewrite(graph: ir.Graph) -> int:
    count = 0
    while (decision := _next(graph, count)) is not None:
        _write(graph, decision, count)
        count += 1
    return count


def _next(graph: ir.Graph, number: int) -> _Decision | None:
    """The first decision of a graph that is worth an `If`."""
    nodes = list(graph)
    found: dict[ir.Value, list[list[ir.Node]]] = {}
    for node in nodes:
        if _joins(node):
            assert node.inputs[0] is not None
            groups = found.setdefault(node.inputs[0], [])
            if not groups or _needs(nodes, node, groups[-1]):
                groups.append([])
            groups[-1].append(node)
    for joins in (group for groups in found.values() for group in groups):
        sides = (_only_for(graph, nodes, joins, 1), _only_for(graph, nodes, joins, 2))
        decision = _Decision(joins, sides)
        if any(_weights(side) >= LEAST for side in decision.sides):
            return decision
    return None


def _joins(node: ir.Node) -> bool:
    """Whether a node takes one of two values as a whole."""
    if node.op_type != "Where" or node.domain not in ("", "ai.onnx"):
        return False
    condition, one, other = node.inputs
    if condition is None or one is None or other is None or one is other:
        return False
    if condition.shape is None or len(condition.shape) > 0:
        return False
    return alike_where_single(one, other, size_said_to_be_one(condition))


def _needs(nodes: Sequence[ir.Node], node: ir.Node, others: Sequence[ir.Node]) -> bool:
    """Whether a node reads what another one makes, directly or not."""
    made = {value for other in others for value in other.outputs}
    begun = False
    for each in nodes:
        begun = begun or each is others[0]
        if begun and not made.isdisjoint(reads(each)):
            made.update(each.outputs)
            if each is node:
                return True
        if each is node:
            return False
    return False


def _only_for(
    graph: ir.Graph, nodes: Sequence[ir.Node], joins: Sequence[ir.Node], place: int
) -> list[ir.Node]:
    """The nodes whose results nothing reads but one operand of some nodes, in the order of the graph."""
    readers: dict[ir.Value, list[tuple[ir.Node, int | None]]] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is not None:
                readers.setdefault(value, []).append((node, index))
        for value in reads(node) if bodies(node) else ():
            readers.setdefault(value, []).append((node, None))
    kept, found = set(graph.outputs), list[ir.Node]()
    moved = set[ir.Node]()
    for node in reversed(nodes):
        uses = [use for value in node.outputs for use in readers.get(value, [])]
        if not uses or not kept.isdisjoint(node.outputs):
            continue
        if all(reader in moved or (reader in joins and index == place) for reader, index in uses):
            moved.add(node)
            found.append(node)
    return found[::-1]


def _weights(side: Sequence[ir.Node]) -> float:
    """How many weights the products of some nodes have; a loop has no bound."""
    return sum(_weights_of(node) for each in side for node in with_inner(each))


def _weights_of(node: ir.Node) -> float:
    if node.op_type in _LOOPS:
        return math.inf
    place = _PRODUCTS.get(node.op_type)
    operand = node.inputs[place] if place is not None and len(node.inputs) > place else None
    if operand is None:
        return 0
    if operand.shape is None:
        return math.inf
    sizes = [size for size in operand.shape if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(operand.shape) else math.inf


def _write(graph: ir.Graph, decision: _Decision, number: int) -> None:
    joins = decision.joins
    moved = [node for side in decision.sides for node in side]
    last = joins[-1]
    _gathered(graph, joins)
    graph.remove(moved)
    branches = [
        _branch([join.inputs[place] for join in joins], side, f"{name}_{number}")
        for name, place, side in zip(("then", "else"), (1, 2), decision.sides, strict=True)
    ]
    condition = joins[0].inputs[0]
    assert condition is not None
    node = ir.node(
        "If",
        [condition],
        attributes={"then_branch": branches[0], "else_branch": branches[1]},
        num_outputs=len(joins),
        name=joins[0].name,
    )
    graph.insert_before(last, node)
    for join, new in zip(joins, node.outputs, strict=True):
        old = join.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    for key, value in joins[0].metadata_props.items():
        node.metadata_props[key] = value
    graph.remove(joins, safe=True)
    single = size_said_to_be_one(condition)
    if single is not None:
        whole_where_single(branches[0], single)
        shared_ends(graph, node)


def _gathered(graph: ir.Graph, joins: Sequence[ir.Node]) -> None:
    """Move what reads some nodes behind the last of them; none of them needs another."""
    last, after = joins[-1], list[ir.Node]()
    made = {value for join in joins for value in join.outputs}
    for node in graph:
        if node is last:
            break
        if node not in joins and not made.isdisjoint(reads(node)):
            made.update(node.outputs)
            after.append(node)
    graph.remove(after)
    graph.insert_after(last, after)


def _branch(results: Sequence[ir.Value | None], nodes: list[ir.Node], name: str) -> ir.Graph:
    made = {value for node in nodes for value in node.outputs}
    outputs: list[ir.Value] = []
    inside = list(nodes)
    for place, value in enumerate(results):
        assert value is not None
        if value in made and value not in outputs:
            outputs.append(value)
            continue
        copy = ir.node("Identity", [value])
        copy.outputs[0].name = f"{name}_{place}"
        copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
        inside.append(copy)
        outputs += copy.outputs
    return ir.Graph([], outputs, nodes=inside, name=name)
