"""Operators that pick by order, which ONNX has only as `TopK`.

kthvalue(x, k)        the k-th of the sorted values
median(x)             the (n + 1) // 2-th: of two in the middle the lower one, as PyTorch has it
searchsorted(s, x)    how many of s are below x: all pairs are compared, len(s) * len(x) of them
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from moe_export.export.onnx.before import Before, arguments

_aten = torch.ops.aten


def _kth(node: fx.Node) -> None:
    value, k, dim, keep = arguments(node, None, None, -1, False)
    before = Before(node)
    _pick(node, value, before, dim, before(operator.sub, k, 1) if isinstance(k, fx.Node) else k - 1, keep)


def _median(node: fx.Node) -> None:
    value, dim, keep = arguments(node, None, -1, False)
    before = Before(node)
    _pick(node, value, before, dim, _middle(before, value, dim), keep)


def _median_of_all(node: fx.Node) -> None:
    before = Before(node)
    flat = before(_aten.reshape.default, *arguments(node), [-1])
    ordered = before(operator.getitem, before(_aten.sort.default, flat), 0)
    node.target, node.args = _aten.squeeze.dim, (_at(before, ordered, 0, _middle(before, flat, 0)), 0)


def _middle(before: Before, value: fx.Node, dim: int) -> fx.Node | int:
    """The place of the median among sorted values; 0 of a number, which has no axis."""
    if not value.meta["val"].dim():
        return 0
    size = value.meta["val"].shape[dim]
    if isinstance(size, int):
        return (size - 1) // 2
    return before(operator.floordiv, before(operator.sub, before.size(value, dim), 1), 2)


def _pick(node: fx.Node, value: fx.Node, before: Before, dim: int, place: fx.Node | int, keep: bool) -> None:
    """Let those that read the value read it of the sorted ones; which place PyTorch gives of equals is not known."""
    if any(user.args[1] != 0 for user in node.users):
        return
    ordered = before(_aten.sort.default, value, dim)
    for user in list(node.users):
        found = before(operator.getitem, ordered, 0)
        if value.meta["val"].dim():
            found = _at(before, found, dim, place)
            found = found if keep else before(_aten.squeeze.dim, found, dim)
        user.replace_all_uses_with(found)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _at(before: Before, value: fx.Node, dim: int, place: fx.Node | int) -> fx.Node:
    """One entry of an axis, which stays."""
    behind = before(operator.add, place, 1) if isinstance(place, fx.Node) else place + 1
    return before(_aten.slice.Tensor, value, dim, place, behind)


def _search(node: fx.Node) -> None:
    """Left of equals unless `right`; a table of one axis is that of every value."""
    table, value = arguments(node)
    given = node.kwargs
    if given.get("sorter") is not None or not isinstance(value, fx.Node):
        return
    right = given.get("right", False) or given.get("side") == "right"
    before = Before(node)
    behind = before(_aten.unsqueeze.default, value, -1)
    if table.meta["val"].dim() > 1:
        table = before(_aten.unsqueeze.default, table, -2)
    passed = before(_aten.le.Tensor if right else _aten.lt.Tensor, table, behind)
    dtype = torch.int32 if given.get("out_int32", False) else torch.int64
    node.target, node.args, node.kwargs = _aten.sum.dim_IntList, (passed, [-1]), {"dtype": dtype}


ORDER_RULES: dict[object, Callable[[fx.Node], None]] = {
    _aten.kthvalue.default: _kth,
    _aten.median.dim: _median,
    _aten.median.default: _median_of_all,
    _aten.searchsorted.Tensor: _search,
}
