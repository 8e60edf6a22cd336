"""Masked indices: a one-hot mask without some of its entries, as a capacity leaves it, as indices; -1 is no expert.

Letters: N tokens, k slots, E experts.
"""

from __future__ import annotations

import torch
from torch import fx

from moe_export.export.experts.derived import derived

_aten = torch.ops.aten


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
