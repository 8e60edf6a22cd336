"""A traced node's arguments, the axes that it names, and the shape of its value, for code that follows axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.operators import ADDS_AN_AXIS
from moe_export.export.sizes import Size, fixed
from moe_export.export.torch_compat.operators import arguments_of

_aten = torch.ops.aten
_AXES = ("dim", "dims", "dim0", "dim1")


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


def named_axes(node: fx.Node) -> tuple[int, ...]:
    """The axes that an operator names, counted from the front; all axes where it leaves them open, as `x.sum()` does.

    They are axes of its source; of its result where it adds one (`unsqueeze`, `stack`), or joins (`cat`).
    """
    first = arguments(node)[0]
    rank = (
        rank_of(node) if isinstance(first, (list, tuple)) or node.target in ADDS_AN_AXIS else rank_of(first)
    )
    found: list[int] = []
    for place, spec in enumerate(arguments_of(node.target)):
        if spec.name in _AXES:
            given = argument(node, place, spec.name, spec.default_value)
            if given is None or given == []:
                return tuple(range(rank))
            found += given if isinstance(given, (list, tuple)) else [given]
    return tuple(axis % max(1, rank) for axis in found)


def named_axis(node: fx.Node) -> int:
    """The axis of an operator that names one."""
    (axis,) = named_axes(node)
    return axis


def with_one_lead(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int, lead: int
) -> tuple[list[Any], dict[str, Any]] | None:
    """The arguments of an operator for values that have one axis in the place of their first `lead` axes, or of none.

    Args:
        target: The operator.
        args: Its arguments.
        kwargs: The same, by name.
        rank: The rank of the value whose axes it names.
        lead: How many axes that one stands for.

    Returns:
        None if it works along one of these, or along all axes.
    """
    args, kwargs, permutes = list(args), dict(kwargs), target is _aten.permute.default
    for place, spec in enumerate(arguments_of(target)):
        if spec.name not in _AXES:
            continue
        given = args[place] if place < len(args) else kwargs.get(spec.name, spec.default_value)
        axes = given if isinstance(given, (list, tuple)) else [given] if given is not None else []
        axes = [axis % rank - lead + 1 for axis in axes]
        if permutes and axes[:lead] == list(range(1 - lead, 1)):
            axes = axes[lead:]
        if min(axes, default=0) < 1:
            return None
        axes = [0, *axes] if permutes else axes
        made = axes if isinstance(given, (list, tuple)) else axes[0]
        if place < len(args):
            args[place] = made
        else:
            kwargs[spec.name] = made
    return args, kwargs


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
