"""Operators on windows of an axis whose size is not known: ONNX or its opset 17 want to know it.

    glu(x)                            x[:half] * sigmoid(x[half:]), by slices
    pad(x, "circular")                the ends of x beside x
    adaptive_avg_pool(x, n)           a product with n windows of an axis of L: i * L // n to ceil((i + 1) * L / n)
    adaptive_max_pool(x, n)           the largest of what lies in each of them, of n * L candidates

Adaptive pools of a known size, or to one window, are left to the exporter. The windows are those of PyTorch's page:
https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool2d.html
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from moe_export.export.onnx.before import Before, arguments

_aten = torch.ops.aten


def _gated(node: fx.Node) -> None:
    value, dim = arguments(node, None, -1)
    if isinstance(value.meta["val"].shape[dim], int):
        return
    before = Before(node)
    half = before(operator.floordiv, before.size(value, dim), 2)
    first = before(_aten.slice.Tensor, value, dim, 0, half)
    second = before(_aten.slice.Tensor, value, dim, half, sys.maxsize)
    node.target, node.args = _aten.mul.Tensor, (first, before(_aten.sigmoid.default, second))


def _circular(node: fx.Node) -> None:
    """Axes from the last on, each padded with what the ones before made of it, as PyTorch does."""
    value, pads, mode, _ = arguments(node, None, None, node.kwargs.get("mode", "constant"), None)
    if mode != "circular" or not all(isinstance(pad, int) and pad >= 0 for pad in pads):
        return
    before = Before(node)
    for axis, (left, right) in enumerate(zip(pads[::2], pads[1::2], strict=True), 1):
        parts = [value]
        if left:
            parts.insert(0, before(_aten.slice.Tensor, value, -axis, -left, sys.maxsize))
        if right:
            parts.append(before(_aten.slice.Tensor, value, -axis, 0, right))
        value = before(_aten.cat.default, parts, -axis) if len(parts) > 1 else value
    node.target, node.args, node.kwargs = _aten.alias.default, (value,), {}


def _average(node: fx.Node) -> None:
    value, sizes = arguments(node)
    axes = _pooled(value, sizes)
    if not axes:
        return
    before = Before(node)
    for axis, size in axes:
        inside = before(
            _aten._to_copy.default, _windows(before, value, axis, size), dtype=value.meta["val"].dtype
        )
        moved = before(_aten.transpose.int, value, axis, -1)
        outer = [before.size(moved, place) for place in range(moved.meta["val"].dim() - 1)]
        rows = before(
            _aten.flatten.using_ints, moved, 0, -2
        )  # without sizes of its own, as a product of matrices has
        total = before(_aten.mm.default, rows, before(_aten.transpose.int, inside, 0, 1))
        total = before(_aten.view.default, total, [*outer, size])
        mean = before(_aten.div.Tensor, total, before(_aten.sum.dim_IntList, inside, [1]))
        value = before(_aten.transpose.int, mean, axis, -1)
    node.target, node.args, node.kwargs = _aten.alias.default, (value,), {}


def _largest(node: fx.Node) -> None:
    """Of places, which are counted over all axes, nothing is made."""
    value, sizes = arguments(node)
    axes = _pooled(value, sizes)
    if not axes or any(user.args[1] != 0 for user in node.users):
        return
    before = Before(node)
    for axis, size in axes:
        outside = before(_aten.logical_not.default, _windows(before, value, axis, size))
        moved = before(_aten.unsqueeze.default, before(_aten.transpose.int, value, axis, -1), -2)
        largest = before(
            _aten.amax.default, before(_aten.masked_fill.Scalar, moved, outside, -torch.inf), [-1]
        )
        value = before(_aten.transpose.int, largest, axis, -1)
    for user in list(node.users):
        user.replace_all_uses_with(value)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _pooled(value: fx.Node, sizes: Sequence[Any]) -> list[tuple[int, int]]:
    """The axes and their numbers of windows; none if the exporter knows the sizes that it needs."""
    shape = value.meta["val"].shape
    axes = [(place - len(sizes), size) for place, size in enumerate(sizes)]
    if not all(isinstance(size, int) and size > 0 for _, size in axes):
        return []
    known = all(isinstance(shape[axis], int) and shape[axis] % size == 0 for axis, size in axes)
    return [] if known or all(size == 1 for _, size in axes) else axes


def _windows(before: Before, value: fx.Node, axis: int, size: int) -> fx.Node:
    """(size, L) of bool: which entries of an axis of L lie in which window."""
    ones = before(_aten.new_ones.default, value, [before.size(value, axis)], dtype=torch.int64)
    place = before(_aten.sub.Tensor, before(_aten.cumsum.default, ones, 0), 1)
    length = before(
        _aten.add.Tensor, before(_aten.amax.default, place, [0]), 1
    )  # the exporter multiplies no size
    window = before(_aten.unsqueeze.default, before(_aten.arange.default, size), -1)
    start = before(_aten.mul.Tensor, window, length)
    first = before(_aten.div.Tensor_mode, start, size, rounding_mode="floor")
    beyond = before(_aten.add.Tensor, before(_aten.add.Tensor, start, length), size - 1)
    end = before(_aten.div.Tensor_mode, beyond, size, rounding_mode="floor")
    return before(
        _aten.logical_and.default,
        before(_aten.ge.Tensor, place, first),
        before(_aten.lt.Tensor, place, end),
    )


WINDOW_RULES: dict[object, Callable[[fx.Node], None]] = {
    _aten.glu.default: _gated,
    _aten.pad.default: _circular,
    _aten.adaptive_avg_pool1d.default: _average,
    _aten.adaptive_avg_pool2d.default: _average,
    _aten.adaptive_max_pool1d.default: _largest,
    _aten.adaptive_max_pool2d.default: _largest,
}
