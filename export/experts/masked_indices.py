"""Masked indices: a one-hot mask without some of its entries, as a capacity leaves it, as indices; -1 is no expert.

Letters: N tokens, k slots, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def masked_indices(one_hot: fx.Node) -> fx.Node:
    """Write the expert of each pair behind its one-hot mask (N, k, E) or (N, E), in which at most one entry is set.

    The nodes are put into the graph; nothing else uses them until a block is found.
    """
    graph = one_hot.graph
    with graph.inserting_after(one_hot):
        numbers = _call(graph, one_hot, _aten._to_copy.default, (one_hot,), dtype=torch.float32)
    last = numbers
    for target, inputs in (
        (_aten.argmax.default, (numbers, -1, False)),
        (_aten.amax.default, (numbers, [-1], False)),
    ):
        with graph.inserting_after(last):
            last = _call(graph, one_hot, target, inputs)
    most, first = last, last.prev  # (N, k): the largest entry, and where it is
    with graph.inserting_after(last):
        is_set = _call(graph, one_hot, _aten.gt.Scalar, (most, 0))
    with graph.inserting_after(is_set):
        nobody = _call(graph, one_hot, _aten.full_like.default, (first, -1))
    with graph.inserting_after(nobody):
        return _call(graph, one_hot, _aten.where.self, (is_set, first, nobody))


def masked_indices_among(indices: fx.Node, kept: fx.Node) -> fx.Node:
    """Write the indices of the pairs that are kept, (N, k) or (N,), and -1 for the others."""
    graph = indices.graph
    last = next(node for node in reversed(graph.nodes) if node in (indices, kept))
    with graph.inserting_after(last):
        nobody = _call(graph, indices, _aten.full_like.default, (indices, -1))
    with graph.inserting_after(nobody):
        return _call(graph, indices, _aten.where.self, (kept, indices, nobody))


def _call(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    values = fx.map_arg(args, lambda each: each.meta["val"])
    node.meta = {**like.meta, "val": target(*values, **kwargs)}
    return node
