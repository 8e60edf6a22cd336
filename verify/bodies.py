"""Subgraphs of ONNX nodes: the bodies of `If`, `Loop` and `Scan`, which capture values from the graphs around them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def bodies(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    """The bodies of a node, by attribute."""
    return {
        attribute.name: attribute.g
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
    }


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and every body in it."""
    yield graph
    for node in graph.node:
        for body in bodies(node).values():
            yield from all_graphs(body)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node; the nodes of a body follow the node that has it."""
    for node in graph.node:
        yield node
        for body in bodies(node).values():
            yield from all_nodes(body)


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, including what its bodies capture."""
    yield from (name for name in node.input if name)
    for body in bodies(node).values():
        yield from captured(body)


def captured(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that a body captures from the graphs around it."""
    inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    inside |= {name for node in graph.node for name in node.output}
    for node in graph.node:
        yield from (name for name in reads(node) if name not in inside)
    yield from (value.name for value in graph.output if value.name not in inside)
