"""Parts of a graph in one form, whatever their nodes are called, so that two of them can be compared.

`pass_by_copies` makes nodes read what a copy was made from, `value_numbering` tells which nodes of a graph compute the
same, `Walk` puts the nodes between a result and what it is computed from into an order and refers to each by its place,
and `text_of` does so with a whole body.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.operators import CASTS, VIEWS
from moe_export.export.axes.shapes import arguments, shape_of
from moe_export.export.sizes import same_shape

_aten = torch.ops.aten
_COPIES = {*CASTS, *VIEWS, _aten.slice.Tensor, _aten.expand.default, _aten.squeeze.dim}
_LAY_OUT = {
    _aten.clone.default,
    _aten.contiguous.default,
}  # what follows may be a view that needs their strides, but for a vector, of which every view can be taken


def pass_by_copies(graph: fx.Graph) -> None:
    """Let every node read what a copy was made from, in place: `x[:]`, a reshape to the same shape, a cast to its type,
    a clone of a vector.

    The copies stay where they are outputs of the program; elsewhere they are dead code.
    """
    for node in graph.nodes:
        source = arguments(node)[0] if node.target in _COPIES and node.args else None
        if isinstance(source, fx.Node) and _is_copy(node, source):
            node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output")


def _is_copy(node: fx.Node, source: fx.Node) -> bool:
    if node.target in _LAY_OUT and len(shape_of(node)) > 1:
        return False
    if node.target is _aten.slice.Tensor and not _takes_all(node, source):
        return False
    same_type = node.meta["val"].dtype is source.meta["val"].dtype
    return same_type and same_shape(shape_of(node), shape_of(source))


def _takes_all(node: fx.Node, source: fx.Node) -> bool:
    """Whether a slice ends where its source does, whatever the sizes are.

    Sizes that a trace takes for equal need not be: it has no sizes of 0 and 1, so max(1, n) is n to it.
    """
    given = dict(zip(("axis", "start", "end", "step"), arguments(node)[1:], strict=False))
    axis, start, end, step = given.get("axis", 0), given.get("start"), given.get("end"), given.get("step", 1)
    size = shape_of(source)[axis]
    if start not in (0, None) or step != 1:
        return False
    if isinstance(end, fx.Node):
        return end.target is _aten.sym_size.int and end.args == (source, axis)
    return end is None or end == sys.maxsize or (isinstance(size, int) and end >= size)


def value_numbering(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Each node → the first node that computes the same: the iterations of a loop compute some values again."""
    first: dict[str, fx.Node] = {}
    value_numbers: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        value_numbers[node] = node
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded not in getattr(
            node.target, "tags", ()
        ):
            key = repr(
                (str(node.target), fx.map_arg((node.args, node.kwargs), lambda arg: value_numbers[arg]))
            )
            value_numbers[node] = first.setdefault(key, node)
    return value_numbers


def text_of(body: fx.GraphModule) -> list[str]:
    """The steps of a body as text."""
    names = {node: f"%{place}" for place, node in enumerate(body.graph.nodes)}
    return [
        str((node.op == "placeholder" or str(node.target), fx.map_arg((node.args, node.kwargs), names.get)))
        for node in names
    ]


class Walk:
    """The nodes that a result is computed by, back to where a part of the graph begins.

    Attributes:
        nodes: The nodes, each after those that it reads.
        leaves: Nodes that they read from outside, in the order of their first use.
        seeds: Nodes that the part begins with, likewise.
        steps: Each node's target and arguments, with references by place.

    Args:
        result: The last node.
        end: Where the part begins: "leaf", "seed", or how all nodes refer to one; None for a node of the part.
        same: The node that stands for a node, such as the first that computes the same.
        given: How a node refers to an input that is none of the part, such as the rows of an expert; None for others.
        arguments: A node's arguments as they are compared.
    """

    def __init__(
        self,
        result: fx.Node,
        end: Callable[[fx.Node], Any],
        same: Callable[[fx.Node], fx.Node] = lambda node: node,
        given: Callable[[fx.Node, fx.Node], Any] = lambda source, user: None,
        arguments: Callable[[fx.Node], Any] = lambda node: node.args,
    ) -> None:
        self.nodes: list[fx.Node] = []
        self.leaves: list[fx.Node] = []
        self.seeds: list[fx.Node] = []
        places: dict[fx.Node, Any] = {}
        stack = [(result, False)]
        while stack:
            node, done = stack.pop()
            node = same(node)
            if node in places:
                continue
            kind = "node" if done else end(node)
            if kind is None:
                stack.append((node, True))
                sources = [source for source in node.all_input_nodes if given(source, node) is None]
                stack += [(source, False) for source in reversed(sources)]
                continue
            own = {"node": self.nodes, "leaf": self.leaves, "seed": self.seeds}.get(kind)
            places[node] = (kind, len(own)) if own is not None else kind
            if own is not None:
                own.append(node)

        def step(node: fx.Node) -> tuple[Any, str]:
            def refer(source: fx.Node) -> Any:
                found = given(source, node)
                return places[same(source)] if found is None else found

            return node.target, repr(fx.map_arg((arguments(node), node.kwargs), refer))

        self.steps = [step(node) for node in self.nodes]
