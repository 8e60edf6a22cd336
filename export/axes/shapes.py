"""A traced node's arguments, the shape of its value, and whether that is 0, 1, 2, ..., for code that follows axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_export.export.sizes import Size, fixed

_aten = torch.ops.aten


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments, typed as `Any`: an operator's schema says what they are, but no type checker reads it."""
    return node.args


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument, given by its place or by its name."""
    found = arguments(node)
    return found[place] if len(found) > place else node.kwargs.get(name, default)


def shape_of(node: object) -> tuple[Size, ...]:
    """The shape of a node's value; empty if that is not a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def rank_of(node: fx.Node) -> int:
    return len(shape_of(node))


def rest_of(node: fx.Node, lead: int) -> list[int] | None:
    """The sizes after the `lead` leading axes; None if one of them is not fixed."""
    numbers = [fixed(size) for size in shape_of(node)[lead:]]
    return [number for number in numbers if number is not None] if None not in numbers else None


def order_of(node: fx.Node) -> list[int]:
    """For each axis of the result of a transpose or a permutation, the axis of the source that it is."""
    rank = rank_of(node)
    if node.target is _aten.permute.default:
        return [axis % rank for axis in arguments(node)[1]]
    order = list(range(rank))
    if node.target is _aten.numpy_T.default:
        return order[::-1]
    if rank < 2:
        return order
    one, other = (axis % rank for axis in (arguments(node)[1:3] or (-2, -1)))
    order[one], order[other] = order[other], order[one]
    return order


def is_numbering(node: fx.Node) -> bool:
    """Whether a value is 0, 1, 2, ..., n - 1."""
    if node.target is _aten.arange.default:
        return True
    if node.target is _aten.arange.start:
        return bool(node.args[0] == 0)
    return node.target is _aten.arange.start_step and bool(node.args[0] == 0 and (*node.args, 1)[2] == 1)
