"""Mutants: copies of a right graph, each with one thing wrong, to test whether a comparison notices.

| kind | what is wrong | where |
|---|---|---|
| weight | one element off by 1e-3 | `weights` |
| transposed, swapped, experts swapped | a square weight; two of one shape; all weights of two that are numbered | |
| NaN, broadcast | one element; the first element for all | |
| bias | left out | `nodes` |
| operator, activation | another of the same form | |
| axis, perm, top-k, epsilon, slice | another axis, two axes exchanged, k or the order, ten times, off by one | |
| packed | a code, a scale or a zero point; the codes of a byte exchanged; a block further | `packed` |
| constant | the value that the example gives in place of the computation | `baked` |

A mutant that onnxruntime rejects is stillborn, and one that computes the same in float64 for all inputs is equivalent:
neither counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from moe_export.verify.bodies import all_graphs, bodies
from moe_export.verify.specs import Array

KINDS = (
    "weight",
    "transposed",
    "swapped",
    "experts swapped",
    "NaN",
    "broadcast",
    "bias",
    "operator",
    "activation",
    "axis",
    "perm",
    "top-k",
    "epsilon",
    "slice",
    "constant",
    "packed",
)

Change = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True)
class Mutant:
    """A graph with one thing wrong.

    Args:
        kind: One of `KINDS`.
        node: The node that is changed, or that reads the constant that is.
        what: What is wrong.
        change: Applies the fault to a copy of the graph.
    """

    kind: str
    node: str
    what: str
    change: Change

    def __str__(self) -> str:
        return f"{self.kind}: {self.node}: {self.what}"

    def of(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The mutant of the graph that it was found in."""
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        self.change(copy)
        del copy.graph.value_info[:]  # sizes of values that may have changed
        return copy


@dataclass(frozen=True)
class Place:
    """A node in a graph, or in a body in it: the indices of nodes and the bodies' attributes on the way to it."""

    path: tuple[tuple[int, str], ...]
    index: int

    def graph(self, model: onnx.ModelProto) -> onnx.GraphProto:
        """The graph that the node stands in."""
        graph = model.graph
        for index, name in self.path:
            graph = next(item.g for item in graph.node[index].attribute if item.name == name)
        return graph

    def node(self, model: onnx.ModelProto) -> onnx.NodeProto:
        """The node."""
        node: onnx.NodeProto = self.graph(model).node[self.index]
        return node


def places(
    graph: onnx.GraphProto, path: tuple[tuple[int, str], ...] = ()
) -> Iterator[tuple[Place, onnx.NodeProto]]:
    """Every node of a graph and of the bodies in it."""
    for index, node in enumerate(graph.node):
        yield Place(path, index), node
        for name, body in bodies(node).items():
            yield from places(body, (*path, (index, name)))


def name_of(node: onnx.NodeProto) -> str:
    """What reports call a node."""
    return node.name or next((name for name in node.output if name), node.op_type)


@dataclass(frozen=True)
class Constants:
    """The initializers of a graph and of its bodies, and who reads them.

    Args:
        arrays: By name.
        readers: The nodes that read each, and as which input.
    """

    arrays: dict[str, Array]
    readers: dict[str, list[tuple[onnx.NodeProto, int]]]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Constants:
        """Those of a model."""
        arrays = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for graph in all_graphs(model.graph)
            for tensor in graph.initializer
        }
        readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {name: [] for name in arrays}
        for _, node in places(model.graph):
            for index, name in enumerate(node.input):
                if name in readers:
                    readers[name].append((node, index))
        return cls(arrays, readers)

    def reader(self, name: str) -> str:
        """The node that reads a constant, for a report."""
        return name_of(self.readers[name][0][0])


def replace_constants(new: dict[str, Array]) -> Change:
    """Put other arrays in place of initializers."""

    def change(model: onnx.ModelProto) -> None:
        for tensor in (each for graph in all_graphs(model.graph) for each in graph.initializer):
            if tensor.name in new:
                tensor.CopyFrom(
                    onnx.numpy_helper.from_array(np.ascontiguousarray(new[tensor.name]), tensor.name)
                )

    return change


def by_kind(mutants: Sequence[Mutant], limit: int) -> list[Mutant]:
    """At most `limit` mutants of each kind, spread evenly over the graph; all of them if it is 0."""
    if not limit:
        return list(mutants)
    chosen: list[Mutant] = []
    for kind in dict.fromkeys(mutant.kind for mutant in mutants):
        those = [mutant for mutant in mutants if mutant.kind == kind]
        step = max(1, -(-len(those) // limit))
        chosen += those[::step]
    return chosen
