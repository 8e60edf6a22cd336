"""What a traced value says about which experts were hit, read off the operators that made it.

one_hot(idx).sum((0, 1)) > 0        whether each expert has tokens
(idx == e).any()                    whether expert e has
nonzero of either, unique(idx)      which experts have
bincount, sums of a mask            how many each has
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.chosen import experts_of
from moe_export.export.axes.listing import counted_entries, listing_of
from moe_export.export.axes.one_hot import one_hot_mask_of
from moe_export.export.axes.support import support_of
from moe_export.export.sizes import fixed

_aten = torch.ops.aten

AS_ITS_SOURCE = {
    _aten._to_copy.default, _aten.to.dtype_layout, _aten.to.dtype, _aten.to.device, _aten.to.other,
    _aten.clone.default, _aten.select.int, _aten.view.default, _aten.alias.default,
    _aten.flatten.using_ints, _aten.reshape.default,
    _aten.squeeze.default, _aten.squeeze.dim, _aten.detach.default, _aten.index.Tensor, _aten.lift_fresh_copy.default,
    _aten.unbind.int, _aten.item.default, _aten.slice.Tensor, _aten.unsqueeze.default, _aten.permute.default,
}  # fmt: skip
_ABOVE = {_aten.gt.Scalar, _aten.ne.Scalar, _aten.greater.Scalar, _aten.not_equal.Scalar}
_COUNTS = {
    _aten.sum.default, _aten.sum.dim_IntList, _aten.bincount.default, _aten.count_nonzero.default,
    _aten.count_nonzero.dim_IntList,
}  # fmt: skip
_DISTINCT = {_aten._unique2.default, _aten._unique.default}  # in ascending order, asked for or not
_SOME = {_aten.any.default, _aten.any.dim, *_COUNTS}


def truth_of_hit(node: fx.Node | None, is_one_hot: Callable[[fx.Node], bool] | None = None) -> bool | None:
    """Whether a condition holds for an expert that has tokens; None if it is no question about that."""
    if node is None:
        return None
    target, args = node.target, node.args
    if target is _aten.logical_not.default or target is _aten.bitwise_not.default:
        inner = truth_of_hit(args[0], is_one_hot)  # type: ignore[arg-type]
        return None if inner is None else not inner
    if target in _ABOVE and args[1] == 0:
        return True if _is_amount(args[0], is_one_hot) else None
    if target is _aten.ge.Scalar and args[1] == 1:
        return True if _is_amount(args[0], is_one_hot) else None
    if target is _aten.eq.Scalar and args[1] == 0:
        return False if _is_amount(args[0], is_one_hot) else None
    if _is_amount(node, is_one_hot):
        return True
    return (
        truth_of_hit(args[0], is_one_hot)
        if target in AS_ITS_SOURCE and isinstance(args[0], fx.Node)
        else None
    )


def _is_amount(node: Any, is_one_hot: Callable[[fx.Node], bool] | None = None) -> bool:
    """Whether a value says how many, or whether any, pairs chose an expert."""
    is_one_hot = is_one_hot or _is_one_hot
    while isinstance(node, fx.Node):
        if node.target in _SOME:
            source = node.args[0]
            return isinstance(source, fx.Node) and (is_one_hot(source) or _is_amount(source, is_one_hot))
        if node.target not in AS_ITS_SOURCE:
            return False
        node = node.args[0]
    return False


def _is_one_hot(node: fx.Node) -> bool:
    return one_hot_mask_of(node) is not None


def is_count(node: fx.Node | None, *, running: bool = False) -> bool:
    """Whether a value is the number of rows of one expert, an element of what counts them, or of its running sum."""
    passed = AS_ITS_SOURCE | {operator.getitem} | ({_aten.cumsum.default} if running else set())
    while node is not None and node.target in passed:
        node = node.args[0] if isinstance(node.args[0], fx.Node) else None
    return node is not None and counts_pairs(node)


def counts_pairs(node: fx.Node) -> bool:
    """Whether a value says how many pairs each expert has: of a choice, or of a matrix whose pairs are listed."""
    if node.target not in _COUNTS:
        return False
    entries = counted_entries(node)
    if entries is None or _is_amount(node):
        return _is_amount(node)
    return support_of(entries.matrix) is not None or _is_listed(entries.matrix)


def _is_listed(matrix: fx.Node) -> bool:
    """Whether code lists which entries of a matrix are set: the matrix itself, transposed or compared."""
    waiting, seen = [matrix], {matrix}
    while waiting:
        for user in waiting.pop().users:
            found = listing_of(user)
            if found is not None and found.entries is not None and found.entries.matrix is matrix:
                return True
            if user not in seen and len(user.all_input_nodes) == 1:
                seen.add(user)
                waiting.append(user)
    return False


def _distinct_experts(node: Any) -> int | None:
    """E, if an operator sorts out which numbers of experts occur among those that were chosen."""
    if not isinstance(node, fx.Node) or node.target not in _DISTINCT:
        return None
    return experts_of(node.args[0])  # type: ignore[arg-type]


def hit_experts(node: fx.Node | None) -> int | None:
    """E, if a value lists the experts that were hit: `nonzero` of a count or a mask over experts, `unique`."""
    while node is not None and node.target in AS_ITS_SOURCE - {_aten.index.Tensor}:
        node = node.args[0] if isinstance(node.args[0], fx.Node) else None
    if node is not None and node.target is operator.getitem and node.args[1] == 0:
        return _distinct_experts(node.args[0])
    if node is None or node.target is not _aten.nonzero.default:
        return None
    counted = node.args[0]
    assert isinstance(counted, fx.Node)
    value = counted.meta.get("val")
    source: Any = counted
    while isinstance(source, fx.Node) and source.target in _ABOVE | {_aten.ge.Scalar}:
        source = source.args[0]
    if not _is_amount(source) or not isinstance(value, torch.Tensor) or value.dim() != 1:
        return None
    if fixed(value.shape[0]) is None:
        return None
    # A mask may have a class more than there are experts, which is never hit.
    return min(int(value.shape[0]), experts_of(_indices_of(source)) or int(value.shape[0]))


def _indices_of(node: fx.Node | None) -> fx.Node | None:
    """The chosen experts that an amount was counted from."""
    while node is not None:
        one_hot = one_hot_mask_of(node)
        if one_hot is not None:
            return one_hot.indices
        node = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    return None
