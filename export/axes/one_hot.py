"""One-hot masks: which token-expert pairs a mask selects, read symbolically, in whatever order the code put its axes.

Letters: N tokens, k slots (choices of a token), E experts.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.operators import BOTH, CASTS, NONZERO, TURNS, ZEROS
from moe_export.export.axes.shapes import (
    argument,
    arguments,
    is_numbering,
    named_axes,
    named_axis,
    order_of,
    shape_of,
)
from moe_export.export.sizes import fixed, same_shape, same_size

_aten = torch.ops.aten

_MOVES = {
    *TURNS, _aten.eq.Scalar, _aten.view.default, _aten.reshape.default, _aten.select.int, _aten.any.dim,
    _aten.sum.dim_IntList, _aten.amax.default, _aten.unsqueeze.default, _aten.squeeze.dim,
}  # fmt: skip
_ADD_AXES = {_aten.unsqueeze.default, _aten.view.default, _aten.reshape.default}


@dataclass(frozen=True)
class OneHotMask:
    """A value that is true, or 1, where a pair chose an expert.

    Attributes:
        indices: The chosen experts, (N, k) or (N,).
        axes: What each dimension runs over: "token", "slot", "expert".
        expert: The one expert that is selected, once no axis runs over experts any more.
        exact: Every pair is selected; False where some are left out, or the axes were merged.
        remaining: Where it is not exact: the entries that are left, (N, k, E) or (N, E).
        among: Where it is not exact: the pairs that count, as bool of the shape of the indices.
    """

    indices: fx.Node
    axes: tuple[str, ...]
    expert: int | None = None
    exact: bool = True
    remaining: fx.Node | None = None
    among: fx.Node | None = None


def one_hot_mask_of(node: fx.Node) -> OneHotMask | None:
    """A value read as a one-hot mask of chosen experts; None if it is not one, or has an unknown form."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    make = _MADE.get(node.target)
    found = make(node) if make is not None else None
    if found is not None or node.target not in _MOVES | CASTS | NONZERO:
        return found
    inner = one_hot_mask_of(node.args[0])
    return _moved(node, inner) if inner is not None else None


def _one_hot(node: fx.Node) -> OneHotMask | None:
    indices = arguments(node)[0]
    axes = index_axes(indices)
    return OneHotMask(indices, (*axes, "expert")) if axes else None


def _equal_to(node: fx.Node) -> OneHotMask | None:
    """`idx == e`."""
    indices, number = arguments(node)
    axes = index_axes(indices)
    return OneHotMask(indices, axes, number) if axes and isinstance(number, int) else None


def _scattered(node: fx.Node) -> OneHotMask | None:
    """`zeros(N, E).scatter(1, idx, 1)`: whether the token chose the expert."""
    base, axis, indices, value = arguments(node)
    if axis not in (1, -1) or value != 1:
        return None
    if base.target not in ZEROS or index_axes(indices) != ("token", "slot"):
        return None
    return OneHotMask(indices, ("token", "expert"))


def _compared(node: fx.Node) -> OneHotMask | None:
    """`idx[..., None] == arange(E)`, either side first; or `idx == arange(E)`, where a token has one choice."""
    for chosen, compared in (node.args, node.args[::-1]):
        numbers = compared
        while isinstance(numbers, fx.Node) and numbers.target in _ADD_AXES | CASTS:
            numbers = numbers.args[0]
        if not isinstance(chosen, fx.Node) or not isinstance(numbers, fx.Node) or not is_numbering(numbers):
            continue
        tokens, experts = shape_of(chosen)[:-1], shape_of(numbers)
        if not same_shape(shape_of(chosen)[-1:], (1,)) or not same_shape(shape_of(node), (*tokens, *experts)):
            continue
        whole = arguments(chosen)[0] if chosen.target in _ADD_AXES else chosen
        if same_shape(shape_of(whole), tokens) and index_axes(whole):
            return OneHotMask(whole, (*index_axes(whole), "expert"))
        if index_axes(chosen)[-1:] == ("slot",):
            return OneHotMask(chosen, (*index_axes(chosen)[:-1], "expert"))
    return None


def _unbound(node: fx.Node) -> OneHotMask | None:
    """What `for mask in masks` takes, one mask an expert."""
    unbind, place = arguments(node)
    if unbind.target is not _aten.unbind.int:
        return None
    inner = one_hot_mask_of(arguments(unbind)[0])
    return _without(inner, named_axis(unbind), place) if inner is not None else None


def _masked(node: fx.Node) -> OneHotMask | None:
    """A one-hot mask times another mask, such as that of a capacity, which leaves out some of the pairs."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point:
        return None
    for source in node.all_input_nodes:
        inner = one_hot_mask_of(source)
        if inner is not None and same_shape(shape_of(source), shape_of(node)):
            among = _among(node, source, inner)
            if among is not None:
                return dataclasses.replace(inner, exact=False, among=among)
            canonical = inner.axes in (("token", "slot", "expert"), ("token", "expert"))
            return dataclasses.replace(inner, exact=False, remaining=node if canonical else None)
    return None


def _among(node: fx.Node, source: fx.Node, inner: OneHotMask) -> fx.Node | None:
    """The `kept` of `(indices == e) & kept`: which pairs count, the same for every expert."""
    others = [each for each in node.all_input_nodes if each is not source]
    if not inner.exact or inner.expert is None or inner.axes != index_axes(inner.indices) or len(others) != 1:
        return None
    value = others[0].meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.bool:
        return None
    same = same_shape(value.shape, shape_of(node))
    return others[0] if same and one_hot_mask_of(others[0]) is None else None


def _merged(node: fx.Node, inner: OneHotMask) -> OneHotMask | None:
    """After a reshape that splits or joins the axes before that of the experts."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if inner.axes[-1:] != ("expert",) or len(after) != 3 or not same_size(before[-1], after[-1]):
        return None
    return OneHotMask(inner.indices, ("token", "slot", "expert"), exact=False, remaining=node)


def _moved(node: fx.Node, inner: OneHotMask) -> OneHotMask | None:
    """The mask after one more operator."""
    target, args = node.target, node.args
    if (
        target in CASTS
        or (target in NONZERO and args[1] == 0)
        or (target is _aten.eq.Scalar and args[1] == 1)
    ):
        return inner
    if target in (_aten.view.default, _aten.reshape.default):
        return _merged(node, inner)
    if target in TURNS:
        return dataclasses.replace(inner, axes=tuple(inner.axes[axis] for axis in order_of(node)))
    if target is _aten.select.int:
        return _without(inner, named_axis(node), int(args[2]))  # type: ignore[arg-type]
    if target in (_aten.any.dim, _aten.sum.dim_IntList, _aten.amax.default):
        return _reduced(node, inner)
    if target is _aten.unsqueeze.default and named_axes(node) == (0,):
        return dataclasses.replace(inner, axes=("one", *inner.axes))
    if target is _aten.squeeze.dim:
        return _squeezed(node, inner, named_axis(node))
    return None


def _squeezed(node: fx.Node, inner: OneHotMask, axis: int) -> OneHotMask | None:
    if same_shape(shape_of(node), shape_of(node.args[0])):
        return inner  # nothing of size 1 there
    if inner.axes[axis] not in ("one", "slot"):
        return None
    return dataclasses.replace(inner, axes=inner.axes[:axis] + inner.axes[axis + 1 :])


def _without(inner: OneHotMask, axis: int, index: int) -> OneHotMask | None:
    if inner.axes[axis] != "expert":
        return None
    return dataclasses.replace(inner, axes=inner.axes[:axis] + inner.axes[axis + 1 :], expert=index)


def _reduced(node: fx.Node, inner: OneHotMask) -> OneHotMask | None:
    """Reduced over the slots: whether the token chose the expert at all (a token chooses it once at most)."""
    kept, wanted = argument(node, 2, "keepdim", False), named_axes(node)
    if kept or [inner.axes[axis] for axis in wanted] != ["slot"]:
        return None
    left = tuple(name for axis, name in enumerate(inner.axes) if axis not in wanted)
    return dataclasses.replace(inner, axes=left)


def index_axes(node: fx.Node) -> tuple[str, ...]:
    """What each axis of chosen indices runs over: the last over slots, if it is one of several and of fixed size; all
    others over tokens. Empty for anything but integers.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype is torch.bool:
        return ()
    if not value.dim():
        return ()
    slots = value.dim() > 1 and fixed(value.shape[-1]) is not None
    tokens = value.dim() - slots
    return ("token",) * tokens + ("slot",) * slots


_MADE: Mapping[Any, Callable[[fx.Node], OneHotMask | None]] = {
    _aten.one_hot.default: _one_hot,
    _aten.eq.Scalar: _equal_to,
    _aten.eq.Tensor: _compared,
    operator.getitem: _unbound,
    **dict.fromkeys((_aten.scatter.value, _aten.scatter_.value), _scattered),
    **dict.fromkeys(BOTH, _masked),
}
