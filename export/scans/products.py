"""`small_products_first`: a product of several factors that are broadcast, in the order that computes least.

    before   (delta[d, 1] * B[1, n]) * u[d, 1]     2 d n products a step
    after    (delta[d, 1] * u[d, 1]) * B[1, n]     d n + d

    before   S[p, n] @ (a[n, 1] @ b[1, m])         p n m multiplications
    after    (S[p, n] @ a[n, 1]) @ b[1, m]         p n + p m

The first inside the step and without a state; the second with one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import onnx_ir as ir

from moe_export.export.scans.batched import size_of
from moe_export.export.scans.loop_region import LoopRegion
from moe_export.graph_builder import GraphBuilder

_Shape = tuple[int | ir.SymbolicDim, ...]


def small_products_first(loop: LoopRegion) -> None:
    """Rewrite each product of three or more factors where another order computes less, in place."""
    dependent = loop.dependent()
    for node in loop.body:
        if node.op_type == "MatMul" and node.domain in ("", "ai.onnx"):
            _outer_product_last(loop, node, dependent)
    inside = {node for node in loop.body if _is_product(node) and node.outputs[0] not in dependent}
    for node in loop.body:
        if node not in inside or any(user in inside for user, _ in node.outputs[0].uses()):
            continue
        factors = _factors(node, inside)
        if len(factors) > 2 and all(factor.shape is not None for factor in factors):
            _write(
                GraphBuilder.in_front_of(node, f"product_{loop.number}_{node.outputs[0].name}"),
                node,
                factors,
                inside,
            )


def _outer_product_last(loop: LoopRegion, node: ir.Node, dependent: set[ir.Value]) -> None:
    """Multiply a state by one side of an outer product first, and the result by the other."""
    for place, value in enumerate(node.inputs):
        other, pair = node.inputs[1 - place], value.producer() if value is not None else None
        if other not in dependent or value in dependent or pair is None or pair.op_type != "MatMul":
            continue
        sides, output = list(pair.inputs), node.outputs[0]
        shapes = [one.shape for one in (*sides, other) if one is not None and one.shape is not None]
        if (
            len(shapes) < 3
            or any(len(shape) < 2 for shape in shapes)
            or shapes[0][-1] != 1
            or output.shape is None
        ):
            continue
        nodes = GraphBuilder.in_front_of(node, f"product_{loop.number}_{output.name}")
        first = (
            [other, sides[0]] if place else [sides[1], other]
        )  # S @ (a b) is (S a) b, (a b) @ S is a (b S)
        thin = nodes.op("MatMul", *first)
        batch = _broadcast(tuple(shapes[1 - place])[:-2], tuple(shapes[2])[:-2])
        inner = (shapes[2][-2], 1) if place else (1, shapes[2][-1])
        thin.shape, thin.type = ir.Shape([*batch, *inner]), output.type
        new = nodes.op("MatMul", thin, sides[1]) if place else nodes.op("MatMul", sides[0], thin)
        new.shape, new.type = output.shape, output.type
        output.replace_all_uses_with(new)
        return


def _is_product(node: ir.Node) -> bool:
    return node.op_type == "Mul" and node.domain in ("", "ai.onnx")


def _factors(node: ir.Node, inside: set[ir.Node]) -> list[ir.Value]:
    found: list[ir.Value] = []
    for value in node.inputs:
        assert value is not None
        producer = value.producer()
        if producer is not None and producer in inside and len(value.uses()) == 1:
            found += _factors(producer, inside)
        else:
            found.append(value)
    return found


def _write(nodes: GraphBuilder, node: ir.Node, factors: Sequence[ir.Value], inside: set[ir.Node]) -> None:
    parts: list[tuple[ir.Value | tuple[int, int], _Shape]] = []
    parts = [(factor, tuple(factor.shape or ())) for factor in factors]
    order: list[tuple[int, int]] = []
    cost = 0
    left = list(range(len(parts)))
    while len(left) > 1:
        first, second = min(
            itertools.combinations(left, 2),
            key=lambda pair: size_of(_broadcast(parts[pair[0]][1], parts[pair[1]][1])),
        )
        shape = _broadcast(parts[first][1], parts[second][1])
        cost += size_of(shape)
        order.append((first, second))
        parts.append(((first, second), shape))
        left = [place for place in left if place not in (first, second)] + [len(parts) - 1]
    if cost >= _cost(node, inside):
        return
    values = list(factors)
    for (first, second), (_, shape) in zip(order, parts[len(factors) :], strict=True):
        value = nodes.op("Mul", values[first], values[second])
        value.shape = ir.Shape(shape)
        values.append(value)
    values[-1].shape, values[-1].type = node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(values[-1])


def _cost(node: ir.Node, inside: set[ir.Node]) -> int:
    """How many multiplications a tree of products takes as written."""
    total = size_of(tuple(node.outputs[0].shape or ()))
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if value is not None and producer is not None and producer in inside and len(value.uses()) == 1:
            total += _cost(producer, inside)
    return total


def _broadcast(left: _Shape, right: _Shape) -> _Shape:
    sizes = []
    for a, b in itertools.zip_longest(reversed(left), reversed(right), fillvalue=1):
        sizes.append(b if a == 1 else a)
    return tuple(reversed(sizes))
