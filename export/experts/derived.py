"""Values that a block takes and that the model never computes: the choices of all slots side by side, what a mask holds
for a pair, and masked indices: the expert of each pair that a capacity or a gate of 0 left, -1 for the others.

They are all that finding blocks writes, into its own copy of the program. Nothing there uses them until a block is
outlined, so where a block is refused they go as dead code. What is found reads them like any other value.

Letters: N tokens, k slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.chosen import name_once
from moe_export.export.axes.listing import Entries
from moe_export.export.axes.shapes import rank_of
from moe_export.export.axes.support import scattered_values, support_of

_aten = torch.ops.aten


def derived(like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Write one operator behind the last of the values that it takes.

    Args:
        like: A node of the block, whose line and module the new one is given.
        target: An ATen operator.
        *args: What it takes; at least one is a node.
        **kwargs: The same, by name.
    """
    taken: list[fx.Node] = []
    fx.map_arg((args, kwargs), taken.append)
    with like.graph.inserting_after(max(taken)):
        node = like.graph.call_function(target, args, kwargs)
    values, keywords = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
    node.meta = {**like.meta, "val": target(*values, **keywords)}
    return node


def masked_indices(one_hot: fx.Node) -> fx.Node:
    """The expert of each pair, (N, k) or (N,), by its one-hot mask (N, k, E) or (N, E), in which one entry at most is
    set.
    """
    numbers = derived(one_hot, _aten._to_copy.default, one_hot, dtype=torch.float32)
    first = derived(one_hot, _aten.argmax.default, numbers, -1, False)
    is_set = derived(one_hot, _aten.gt.Scalar, derived(one_hot, _aten.amax.default, numbers, [-1], False), 0)
    return masked_indices_among(first, is_set)


def masked_indices_among(indices: fx.Node, kept: fx.Node) -> fx.Node:
    """The indices of the pairs that are kept, (N, k) or (N,), and -1 for the others."""
    nobody = derived(indices, _aten.full_like.default, indices, -1)
    return derived(indices, _aten.where.self, kept, indices, nobody)


def entries_at(gates: fx.Node, chosen: fx.Node) -> fx.Node:
    """The entries of gates (N, E) for chosen experts (N, k), of their shape."""
    return scattered_values(gates) or derived(gates, _aten.gather.default, gates, 1, chosen)


def indices_of_entries(entries: Entries) -> tuple[fx.Node, fx.Node]:
    """The pairs of some entries of gates (N, E), as indices: -1 for a pair whose entry is not one of them.

    Returns:
        The experts (N, k) that the gates were made from, if these are seen to be 0 elsewhere; all, (N, E), if not. And
        the entry of each pair, of the same shape.
    """
    gates = entries.matrix
    chosen = support_of(gates)
    if chosen is not None and name_once(chosen):
        if rank_of(chosen) == 1:
            chosen = derived(chosen, _aten.unsqueeze.default, chosen, 1)
        weights = entries_at(gates, chosen)
    else:
        ones = derived(gates, _aten.ones_like.default, gates, dtype=torch.int64)
        chosen = derived(gates, _aten.sub.Tensor, derived(gates, _aten.cumsum.default, ones, 1), 1)
        weights = gates
    compare = _aten.gt.Scalar if entries.above else _aten.ne.Scalar
    return masked_indices_among(chosen, derived(weights, compare, weights, 0)), weights
