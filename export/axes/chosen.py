"""The gate that a block's indices come from: how many experts it chooses among, and whether an index may name none.

`topk` or `argmax` of E scores names one of E experts. Indices that come from elsewhere, or that were changed after
the choice, may be -1 or E, for a token that is dropped or for padding.
"""

from __future__ import annotations

import torch
from torch import fx

from moe_export.export.axes.choice import CARRIERS, Choice, as_choice, is_part
from moe_export.export.axes.shapes import arguments, order_of, rank_of, shape_of
from moe_export.export.sizes import same_size

_aten = torch.ops.aten

# Operators that pass on every entry they are given, joined from several sources or split into several parts.
_JOINS = {_aten.cat.default, _aten.stack.default, _aten.unbind.int, _aten.split.Tensor}


def choices_of(indices: fx.Node) -> tuple[Choice, ...]:
    """Every choice that indices come from; empty if any of them may come from anything else."""
    found: list[Choice] = []
    stack, seen = [indices], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        operator = node.args[0] if is_part(node) else node
        choice = as_choice(operator) if isinstance(operator, fx.Node) else None
        if choice is not None and choice.indices is node:
            found.append(choice)
        elif choice is None and (node.target in CARRIERS | _JOINS or is_part(node)):
            stack += node.all_input_nodes
        else:
            return ()
    return tuple(found)


def experts_of(indices: fx.Node | None) -> int | None:
    """How many experts there are to choose from, by the choices that indices come from; None if unknown."""
    return (
        max((choice.experts for choice in choices_of(indices)), default=None) if indices is not None else None
    )


def names_experts(indices: fx.Node, count: int) -> bool:
    """Whether every index is known to be one of 0 to `count` - 1."""
    experts = experts_of(indices)
    return experts is not None and experts <= count


def name_once(indices: fx.Node) -> bool:
    """Whether it is certain that no token names an expert twice: one choice a token, or all from one `topk`.

    Of indices that come from elsewhere (an input, several choices side by side, a table), any two may be the same, and
    of those whose last axis is not that of the slots.
    """
    shape = indices.meta["val"].shape
    if len(shape) == 1 or shape[-1] == 1:
        return True
    node = indices
    while node.args and isinstance(node.args[0], fx.Node):
        choice = as_choice(node.args[0]) if is_part(node) else None
        if choice is not None:
            return choice.indices is node and choice.operator.target is _aten.topk.default
        if node.target not in CARRIERS - {_aten.expand.default} or not _keeps_last(node):
            return False
        node = node.args[0]
    return False


def _keeps_last(node: fx.Node) -> bool:
    """Whether the entries along the last axis of an operator's result stand along that of its source."""
    source, *rest = arguments(node)
    if node.target in (_aten.permute.default, _aten.transpose.int, _aten.t.default):
        return order_of(node)[-1] == rank_of(node) - 1
    if node.target is _aten.select.int:
        return bool(rest[0] % rank_of(source) < rank_of(source) - 1)
    return node.target is _aten.slice.Tensor or same_size(shape_of(node)[-1], shape_of(source)[-1])
