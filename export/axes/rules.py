"""One table of operators: how each maps axes. Some keep them, some move, split or merge them, some pick, add up, sort.

A rule takes the meanings that are known before a node, notes which extents are lined up and to which the order of
entries matters, and gives the meaning of the result: of each part, where that is a tuple. It gives None for a use of
the operator that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moe_export.export.axes import rules_moves as moves
from moe_export.export.axes import rules_picks as picks
from moe_export.export.axes import rules_sums as sums
from moe_export.export.axes.meaning import Meaning, Meanings
from moe_export.export.axes.operators import (
    CASTS,
    JOINS,
    NORMS,
    PARTS,
    REDUCES,
    RUNS,
    SCATTERS,
    SOFTMAXES,
    SORTS,
    TURNS,
    VIEWS,
)
from moe_export.export.axes.rules_loops import loop_part

_aten = torch.ops.aten

Rule = Callable[[Meanings, fx.Node], "Meaning | tuple[Meaning, ...] | None"]


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for a node's operator; None if there is none."""
    rule = RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return sums.pointwise
    return rule


# fmt: off
_CHOOSES = (_aten.topk.default, _aten.max.dim, _aten.min.dim, _aten.argmax.default, _aten.argmin.default)
_NUMBERINGS = (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)

RULES: Mapping[Any, Rule] = {
    # keep
    **dict.fromkeys((*CASTS, _aten.dropout.default), moves.same),
    **dict.fromkeys(SOFTMAXES, sums.kept),
    **dict.fromkeys(NORMS - {_aten.native_layer_norm.default}, sums.norm),
    # split, merge, move, broadcast
    **dict.fromkeys((*VIEWS, _aten.unflatten.int), moves.reshaped),
    **dict.fromkeys(TURNS, moves.permuted),
    **dict.fromkeys((_aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default), moves.squeezed),
    _aten.unsqueeze.default: moves.unsqueezed,
    _aten.expand.default: moves.expanded,
    _aten.repeat.default: moves.repeated,
    _aten.repeat_interleave.self_int: moves.interleaved,
    # made anew
    **dict.fromkeys(
        (_aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default, _aten.empty_like.default),
        moves.like),
    **dict.fromkeys(
        (_aten.zeros.default, _aten.ones.default, _aten.full.default, _aten.scalar_tensor.default,
         _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default), moves.made),
    **dict.fromkeys(_NUMBERINGS, picks.numbering),
    # add up
    **dict.fromkeys(REDUCES, sums.reduced),
    **dict.fromkeys(
        (_aten.sum.default, _aten.mean.default, _aten.max.default, _aten.min.default, _aten.any.default,
         _aten.count_nonzero.default), sums.reduced_to_one),
    **dict.fromkeys((_aten.matmul.default, _aten.mm.default, _aten.bmm.default), sums.matmul),
    _aten.linear.default: sums.linear,
    **dict.fromkeys((_aten.addmm.default, _aten.baddbmm.default), sums.addmm),
    _aten.einsum.default: sums.einsum,
    _aten.scaled_dot_product_attention.default: sums.attention,
    # in an order
    **dict.fromkeys(
        (torch.ops.onnx_symbolic._symbolic.default, torch.ops.onnx_symbolic._symbolic_multi_out.default), loop_part),
    **dict.fromkeys(RUNS, sums.running),
    **dict.fromkeys((_aten.flip.default, _aten.roll.default), sums.kept_in_order),
    **dict.fromkeys((_aten.tril.default, _aten.triu.default), sums.kept_in_order),
    **dict.fromkeys(SORTS, picks.sorted_along),
    **dict.fromkeys(_CHOOSES, picks.chosen),
    **dict.fromkeys((_aten.conv1d.default, _aten.conv2d.default, _aten.convolution.default), sums.convolved),
    **dict.fromkeys((_aten.constant_pad_nd.default, _aten.pad.default), moves.padded),
    # pick
    _aten.select.int: moves.selected,
    _aten.slice.Tensor: moves.sliced,
    **dict.fromkeys(PARTS, moves.parts),
    _aten.unbind.int: moves.unbound,
    **dict.fromkeys(JOINS, moves.joined),
    moves.GETITEM: moves.part,
    _aten.index.Tensor: picks.index,
    _aten.index_select.default: picks.index_select,
    _aten.embedding.default: picks.embedding,
    _aten.gather.default: picks.gathered,
    **dict.fromkeys((*SCATTERS, *picks.ADDS), picks.scattered),
    _aten.index_add.default: picks.index_added,
    _aten.index_put.default: picks.put,
    **dict.fromkeys((_aten.nonzero.default, _aten.argwhere.default), picks.listed),
    **dict.fromkeys((_aten.nonzero_numpy.default, _aten.where.default), picks.listed_apart),
    _aten.masked_select.default: picks.masked,
    # compare, count
    _aten.one_hot.default: picks.one_hot,
    **dict.fromkeys((_aten.bincount.default, _aten.histc.default), picks.counted),
    **dict.fromkeys((_aten.eq.Tensor, _aten.ne.Tensor), picks.compared),
    **dict.fromkeys((_aten.where.self, _aten.where.ScalarOther), picks.where),
    **dict.fromkeys((_aten.floor_divide.default, _aten.div.Tensor_mode, _aten.remainder.Scalar), picks.divided),
}
COMPUTES = {
    sums.pointwise, sums.kept, sums.norm, sums.reduced, sums.reduced_to_one, sums.matmul, sums.linear, sums.addmm,
    sums.einsum, sums.attention, sums.running, sums.kept_in_order, sums.convolved, picks.sorted_along, picks.chosen,
    picks.listed, picks.listed_apart,
}
"""Rules of operators that compute with numbers as with any other values; the others follow what numbers count."""
# fmt: on
