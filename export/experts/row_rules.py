"""The rules of `experts/rows`: for each operator, what its result's axes run over, and how a body computes it.

A rule gives None if the operator mixes rows or moves their axes in an unknown way; what follows from its result is then
not part of the region.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.operators import ALONG, CASTS, NORMS, PARTS, SORTS, TURNS, VIEWS
from moe_export.export.experts.row_columns import columns_after
from moe_export.export.experts.row_order import (
    behind,
    counted,
    counted_from_behind,
    counts,
    divided,
    embedding,
    gather,
    index,
    index_select,
    one_hot,
    put,
    remainder,
    running,
    segment,
    sort,
    token_one_hot,
)  # fmt: skip
from moe_export.export.experts.row_wise import (
    Rule,
    along,
    beside_shared,
    einsum,
    expand,
    matmul,
    of_slot,
    part,
    pointwise,
    repeat,
    reshaped,
    same,
    split,
    turned,
)
from moe_export.export.experts.rows import Region, Rows

_aten = torch.ops.aten


def rows_after(region: Region, node: fx.Node) -> Rows | None:
    """What the axes of a node's value run over, by the rule for its operator; None if that is not known."""
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and first in region.rows and region.rows[first].columns:
        return columns_after(region, node)
    own = region.rules.get(node)
    if own is not None and (found := own(region)) is not None:
        return found
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(region, node)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise(region, node)
    return None


def _summed(region: Region, node: fx.Node) -> Rows | None:
    """A sum of one-hot masks counts pairs; the number of experts whose rows end before a row is the row's expert."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return segment(region, node) or counted(region, node) or along(region, node)


_RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(ALONG, along),
    **dict.fromkeys((*CASTS - {_aten.type_as.default}, _aten.dropout.default), same),
    **dict.fromkeys(VIEWS, reshaped),
    **dict.fromkeys(TURNS, turned),
    **dict.fromkeys((*NORMS, _aten.linear.default, _aten.mm.default, _aten.addmm.default), beside_shared),
    **dict.fromkeys((_aten.bmm.default, _aten.matmul.default), matmul),
    **dict.fromkeys(SORTS, sort),
    **dict.fromkeys((_aten.floor_divide.default, _aten.div.Tensor_mode), divided),
    **dict.fromkeys((_aten.index_put.default, _aten.scatter.src), put),
    **dict.fromkeys((_aten.histc.default, _aten.bincount.default), counts),
    **dict.fromkeys((_aten.squeeze.dim, _aten.select.int), of_slot),
    **dict.fromkeys(PARTS, split),
    _aten.expand.default: expand,
    _aten.repeat.default: repeat,
    _aten.sum.dim_IntList: _summed,
    _aten.cumsum.default: running,
    _aten.one_hot.default: one_hot,
    _aten.gather.default: gather,
    _aten.index.Tensor: index,
    _aten.index_select.default: index_select,
    _aten.embedding.default: embedding,
    _aten.remainder.Scalar: remainder,
    _aten.einsum.default: einsum,
    _aten.ge.Tensor: behind,
    _aten.scatter.value: token_one_hot,
    _aten.where.self: counted_from_behind,
    operator.getitem: part,
}  # fmt: skip
