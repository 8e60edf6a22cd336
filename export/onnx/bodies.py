"""The graphs that nodes hold: bodies of `If`, `Loop` and `Scan`, which read values of the graph around them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The graphs that a node holds."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def with_inner(node: ir.Node) -> Iterator[ir.Node]:
    """A node, and every node in its bodies."""
    yield node
    for body in bodies(node):
        for inner in body:
            yield from with_inner(inner)


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads from the graph that it is in, its bodies included; a value may come more than once."""
    made: set[ir.Value] = set()
    for each in with_inner(node):
        made.update(each.outputs)
        for body in bodies(each):
            made.update(body.inputs)
            made.update(body.initializers.values())
    for each in with_inner(node):
        yield from (value for value in each.inputs if value is not None and value not in made)
        for body in bodies(each):
            yield from (value for value in body.outputs if value not in made)


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Those of a model's graph, and of the graphs in its nodes."""
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        for body in bodies(node):
            yield from body.initializers.values()
