"""Read off a mask which token-expert pairs it marks: symbolically, through whatever order the code put it in.

Letters: N tokens, k slots (choices of a token), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

_aten = torch.ops.aten

# Ops that pass a mark on without moving it: 0 stays false, 1 stays true.
_SAME = {
    _aten._to_copy.default, _aten.to.dtype, _aten.clone.default, _aten.alias.default, _aten.detach.default,
    _aten.contiguous.default, _aten.type_as.default,
}  # fmt: skip
_NONZERO = {_aten.ne.Scalar, _aten.gt.Scalar, _aten.greater.Scalar}


@dataclass(frozen=True)
class Marks:
    """A value that is true, or 1, where a pair chose an expert.

    Attributes:
        indices: The chosen experts, (N, k) or (N,).
        axes: What each dimension runs over: "token", "slot", "expert".
        expert: The one expert that is marked, once no axis runs over experts any more.
    """

    indices: fx.Node
    axes: tuple[str, ...]
    expert: int | None = None


def marks_of(node: fx.Node) -> Marks | None:
    """What a mask marks; None if it is no mark of chosen experts, or in a form that is not known."""
    if node.op != "call_function":
        return None
    target, source = node.target, node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if target is _aten.one_hot.default:
        axes = _index_axes(source)
        return Marks(source, (*axes, "expert")) if axes else None
    if target is _aten.eq.Scalar and isinstance(node.args[1], int):
        axes = _index_axes(source)
        if axes:
            return Marks(source, axes, node.args[1])
    inner = marks_of(source)
    return _moved(node, inner) if inner is not None else None


def _moved(node: fx.Node, inner: Marks) -> Marks | None:
    """The marks after one more operator."""
    target, args, rank = node.target, node.args, len(inner.axes)
    if (
        target in _SAME
        or (target in _NONZERO and args[1] == 0)
        or (target is _aten.eq.Scalar and args[1] == 1)
    ):
        return inner
    if target is _aten.permute.default:
        return Marks(inner.indices, tuple(inner.axes[axis] for axis in args[1]), inner.expert)  # type: ignore[union-attr,index]
    if target is _aten.transpose.int:
        axes = list(inner.axes)
        first, second = int(args[1]) % rank, int(args[2]) % rank  # type: ignore[arg-type]
        axes[first], axes[second] = axes[second], axes[first]
        return Marks(inner.indices, tuple(axes), inner.expert)
    if target is _aten.select.int:
        return _without(inner, int(args[1]) % rank, int(args[2]))  # type: ignore[arg-type]
    if target in (_aten.any.dim, _aten.sum.dim_IntList, _aten.amax.default):
        return _reduced(node, inner)
    if target is _aten.squeeze.dim and str(node.meta["val"].shape) == str(node.args[0].meta["val"].shape):  # type: ignore[union-attr]
        return inner  # nothing of size 1 there
    return None


def _without(inner: Marks, axis: int, index: int) -> Marks | None:
    if inner.axes[axis] != "expert":
        return None
    return Marks(inner.indices, inner.axes[:axis] + inner.axes[axis + 1 :], index)


def _reduced(node: fx.Node, inner: Marks) -> Marks | None:
    """Reduced over the slots: whether the token chose the expert at all (a token chooses it once at most)."""
    axes = node.args[1]
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    wanted = [int(axis) % len(inner.axes) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]  # type: ignore[arg-type]
    if kept or [inner.axes[axis] for axis in wanted] != ["slot"]:
        return None
    left = tuple(name for axis, name in enumerate(inner.axes) if axis not in wanted)
    return Marks(inner.indices, left, inner.expert)


def _index_axes(node: fx.Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype is torch.bool:
        return ()
    return {1: ("token",), 2: ("token", "slot")}.get(value.dim(), ())
