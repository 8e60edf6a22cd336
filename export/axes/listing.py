"""Lists of token-expert pairs: what `nonzero` of a matrix over tokens and experts lists, and in which order.

    nonzero(gates)                    (S, 2): token, expert; in the order of the tokens
    nonzero(gates.t())                (S, 2): expert, token; in the order of the experts
    one_hot(idx).permute(2, 1, 0).nonzero(as_tuple=True)        expert, slot, token
    arange(N).expand(E, N).masked_select(gates.t() > 0)         token; in the order of the experts

Letters: N tokens, k slots, E experts, S pairs that are listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.one_hot import OneHotMask, one_hot_mask_of
from moe_export.export.axes.operators import CASTS, TURNS
from moe_export.export.axes.shapes import (
    arguments,
    is_numbering,
    named_axes,
    named_axis,
    order_of,
    rank_of,
    shape_of,
)
from moe_export.export.axes.support import is_never_negative
from moe_export.export.sizes import fixed, same_shape

_aten = torch.ops.aten

_COMPARED = {_aten.gt.Scalar, _aten.ne.Scalar}
_COUNTS = {_aten.sum.dim_IntList, _aten.count_nonzero.dim_IntList, _aten.count_nonzero.default}


@dataclass(frozen=True)
class Entries:
    """Entries of a matrix (N, E) that are not 0, or above it.

    Attributes:
        matrix: (N, E).
        above: Whether they are above 0; otherwise they are not 0.
        turned: Whether the value at hand has its experts first, (E, N).
        compared: Whether the value at hand is the mask, rather than the matrix.
    """

    matrix: fx.Node
    above: bool = False
    turned: bool = False
    compared: bool = False

    @property
    def experts(self) -> int:
        """E."""
        return int(shape_of(self.matrix)[1])

    def agrees(self, other: Entries) -> bool:
        """Whether both are the same entries, for every value that the matrix may have."""
        if self.matrix is not other.matrix:
            return False
        return self.above == other.above or is_never_negative(self.matrix)


@dataclass(frozen=True)
class Listing:
    """A node that lists pairs.

    Attributes:
        entries: What it lists, of a matrix (N, E).
        one_hot: What it lists, of a one-hot mask (N, k, E); None for a matrix.
        axes: What its columns number: "token", "slot", "expert".
        column: The one of them that the node has, where it has one only.
    """

    entries: Entries | None
    one_hot: OneHotMask | None
    axes: tuple[str, ...]
    column: str = ""

    def agrees(self, other: Listing) -> bool:
        """Whether both list the same pairs in the same order."""
        if self.axes != other.axes:
            return False
        if self.entries is not None and other.entries is not None:
            return self.entries.agrees(other.entries)
        return self.one_hot is not None and self.one_hot == other.one_hot


def entries_of(node: fx.Node) -> Entries | None:
    """A value read as a mask over a matrix of tokens and experts, or as that matrix; None if it can be neither."""
    above, compared, turned = False, False, False
    while node.op == "call_function" and node.args:
        args = arguments(node)
        if node.target in TURNS and rank_of(node) == 2:
            turned = turned is not (order_of(node) == [1, 0])
        elif not compared and node.target in _COMPARED and args[1] == 0:
            above, compared = node.target is _aten.gt.Scalar, True
        elif node.target in CASTS and _keeps_zeros(node):
            source = args[0].meta["val"].dtype
            compared = compared or (node.meta["val"].dtype is torch.bool and source is not torch.bool)
        else:
            break
        node = args[0]
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or fixed(value.shape[1]) is None:
        return None
    return Entries(node, above, turned, compared)


def column_of(node: fx.Node) -> tuple[Entries, int] | None:
    """One expert's column of a mask over tokens and experts, or of the matrix, and the expert: `gates[:, e] > 0`."""
    compared = node.target in _COMPARED and arguments(node)[1] == 0
    source = arguments(node)[0] if compared else node
    if not isinstance(source, fx.Node) or source.target is not _aten.select.int:
        return None
    matrix, _, expert = arguments(source)
    entries = entries_of(matrix)
    if entries is None or rank_of(matrix) != 2 or named_axes(source) == (int(entries.turned),):
        return None
    if compared and not entries.compared:
        entries = dataclasses.replace(entries, above=node.target is _aten.gt.Scalar)
    return entries, expert


def _keeps_zeros(cast: fx.Node) -> bool:
    """Whether the result of a cast is 0 where its source is, and nowhere else: 0.5 as an integer is 0."""
    source, result = (value.dtype for value in (arguments(cast)[0].meta["val"], cast.meta["val"]))
    return result is torch.bool or source in (torch.bool, result)


def listing_of(node: fx.Node) -> Listing | None:
    """The pairs that a node lists as row numbers; None if it lists none."""
    rule = LISTS.get(node.target)
    return rule(node) if rule is not None and isinstance(node.args[0], fx.Node) else None


def _side_by_side(node: fx.Node) -> Listing | None:
    """`nonzero`: all numbers of each pair."""
    source = arguments(node)[0]
    one_hot = one_hot_mask_of(source)
    if one_hot is not None and sorted(one_hot.axes) == ["expert", "slot", "token"]:
        return Listing(None, one_hot, one_hot.axes) if one_hot.exact else None
    entries = entries_of(source) if one_hot is None or one_hot.axes == ("token", "expert") else None
    return Listing(entries, None, _axes_of(entries)) if entries is not None else None


def _one_by_one(node: fx.Node) -> Listing | None:
    """`masked_select` of the tokens' numbers, or the experts', by a mask of pairs: one number of each pair."""
    numbers, mask = arguments(node)
    entries, along = entries_of(mask), _numbered_axis(numbers)
    if entries is None or along is None or not same_shape(shape_of(numbers), shape_of(mask)):
        return None
    return Listing(entries, None, _axes_of(entries), _axes_of(entries)[along])


def _axes_of(entries: Entries) -> tuple[str, ...]:
    return ("expert", "token") if entries.turned else ("token", "expert")


def _numbered_axis(node: fx.Node) -> int | None:
    """Which axis of a matrix its values 0, 1, 2, ... number; None if they number neither."""
    while node.target in (_aten.expand.default, *CASTS) and rank_of(arguments(node)[0]) == 2:
        node = arguments(node)[0]
    source = arguments(node)[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_numbering(source):
        return None
    if node.target is _aten.expand.default:
        return 1
    return 1 - named_axis(node) if node.target is _aten.unsqueeze.default else None


LISTS: dict[Any, Callable[[fx.Node], Listing | None]] = {
    **dict.fromkeys(
        (_aten.nonzero.default, _aten.nonzero_numpy.default, _aten.where.default, _aten.argwhere.default),
        _side_by_side,
    ),
    _aten.masked_select.default: _one_by_one,
}
"""The rule of each operator that lists pairs."""


def counted_entries(node: fx.Node) -> Entries | None:
    """The entries that a node counts for each expert, (E,); None if it counts something else."""
    if node.target not in _COUNTS or len(node.args) != 2:
        return None
    source = arguments(node)[0]
    entries = entries_of(source)
    if entries is None or rank_of(node) != 1:
        return None
    boolean = node.target is not _aten.sum.dim_IntList or source.meta["val"].dtype is torch.bool
    cast = source.target in CASTS and arguments(source)[0].meta["val"].dtype is torch.bool
    return entries if (boolean or cast) and named_axes(node) == (int(entries.turned),) else None
