"""Operators that number, pick, list, sort and count entries (rules of `axes/rules`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.extents import size_of
from moe_export.export.axes.meaning import Meaning, Meanings
from moe_export.export.axes.operators import FULL
from moe_export.export.axes.rules_sums import broadcast, lined_up, pointwise
from moe_export.export.axes.shapes import (
    argument,
    arguments,
    is_numbering,
    named_axes,
    named_axis,
    rank_of,
    shape_of,
)
from moe_export.export.sizes import same_size

_aten = torch.ops.aten
LISTED = "pair in an order"


def numbering(known: Meanings, node: fx.Node) -> Meaning:
    """0, 1, 2, ...: numbers of the entries of its own axis."""
    if not is_numbering(node):
        return known.anew(shape_of(node), node)
    axes = known.anew(shape_of(node)).axes
    return Meaning(axes, numbers=axes[0])


def _lines_up(known: Meanings, node: fx.Node, one: fx.Node, other: fx.Node, but: int) -> None:
    """Line up the axes of two values but for one; those of other sizes are picked by where they stand."""
    sizes = zip(shape_of(one), shape_of(other), strict=True)
    for place, (first, second) in enumerate(sizes):
        axes = [found.axes[place] for each in (one, other) if (found := known.of(each)) is not None]
        if place == but:
            continue
        if same_size(first, second):
            known.extents.match(axes[0], axes[1], node)
        else:
            known.extents.mark(axes, node)


def index(known: Meanings, node: fx.Node) -> Meaning | None:
    """`table[integers]`, `table[mask]`."""
    source, indices = arguments(node)
    if len(indices) == 1 and isinstance(indices[0], fx.Node) and indices[0].meta["val"].dtype is torch.bool:
        return _by_mask(known, node, source, indices[0])
    return _picked(known, node, source, indices)


def index_select(known: Meanings, node: fx.Node) -> Meaning | None:
    source, _, chosen = arguments(node)
    return _picked(known, node, source, [*[None] * named_axis(node), chosen])


def embedding(known: Meanings, node: fx.Node) -> Meaning | None:
    return _picked(known, node, arguments(node)[0], [arguments(node)[1]])


def _picked(known: Meanings, node: fx.Node, source: fx.Node, indices: Sequence[Any]) -> Meaning | None:
    table = known.of(source)
    places = [place for place, each in enumerate(indices) if each is not None]
    chosen = [known.of(indices[place]) for place in places]
    one_after_another = places == list(range(places[0], places[0] + len(places)))
    by_mask = any(indices[place].meta["val"].dtype is torch.bool for place in places)
    if table is None or None in chosen or not one_after_another or by_mask:
        return None
    found = [each for each in chosen if each is not None]
    for place, each in zip(places, found, strict=True):
        known.match_numbers(None if each.partly else each.numbers, table.axes[place], node)
    rank = max(len(each.axes) for each in found)
    first, end = places[0], places[0] + len(places)
    picked = broadcast(known, [each.axes for each in found], shape_of(node)[first : first + rank], node)
    return dataclasses.replace(
        known.whole(table, node), axes=(*table.axes[:first], *picked, *table.axes[end:])
    )


def _by_mask(known: Meanings, node: fx.Node, source: fx.Node, mask: fx.Node) -> Meaning | None:
    """The rows that a mask picks, in their order."""
    table, picks = known.of(source), known.of(mask)
    if table is None or picks is None:
        return None
    rank = len(picks.axes)
    broadcast(known, [table.axes[:rank], picks.axes], shape_of(mask), node)
    known.extents.mark(picks.axes, node)
    rows = known.extents.new(shape_of(node)[0], order=node, role=LISTED)
    return dataclasses.replace(known.whole(table, node), axes=(rows, *table.axes[rank:]))


def masked(known: Meanings, node: fx.Node) -> Meaning | None:
    """`masked_select`: the entries that a mask picks, in their order."""
    found, picks = (known.of(each) for each in arguments(node)[:2])
    if found is None or picks is None:
        return None
    sizes = max(map(shape_of, arguments(node)[:2]), key=len)
    known.extents.mark(broadcast(known, [found.axes, picks.axes], sizes, node), node)
    known.extents.mark([*found.axes, *picks.axes], node)
    return dataclasses.replace(
        known.whole(found, node), axes=(known.extents.new(shape_of(node)[0], order=node, role=LISTED),)
    )


def gathered(known: Meanings, node: fx.Node) -> Meaning | None:
    """`gather`: an entry along one axis for each index."""
    source, _, chosen = arguments(node)[:3]
    table, picks = known.of(source), known.of(chosen)
    if table is None or picks is None or not table.axes:
        return None
    axis = named_axis(node)
    _lines_up(known, node, source, chosen, axis)
    known.match_numbers(None if picks.partly else picks.numbers, table.axes[axis], node)
    return dataclasses.replace(known.whole(table, node), axes=picks.axes)


def scattered(known: Meanings, node: fx.Node) -> Meaning | None:
    """`scatter`, `scatter_add`: entries put, or added, where each index says along one axis."""
    base, _, chosen, values = arguments(node)[:4]
    found, picks = known.of(base), known.of(chosen)
    if found is None or picks is None or not found.axes:
        return None
    axis = named_axis(node)
    _lines_up(known, node, base, chosen, axis)
    known.match_numbers(picks.numbers, found.axes[axis], node)
    known.computed_with(base, node)
    if isinstance(values, fx.Node) and known.of(values) is not None:
        known.computed_with(values, node)
        if rank_of(values) != rank_of(chosen):
            known.used(values, node)
        else:
            _lines_up(known, node, values, chosen, -1)
        if node.target not in ADDS:  # of two entries for one place the order says which stays
            known.extents.mark([picks.axes[axis]], node)
    return Meaning(found.axes)


ADDS = {_aten.scatter_add.default, _aten.scatter_add_.default, _aten.scatter_reduce.two}


def index_added(known: Meanings, node: fx.Node) -> Meaning | None:
    """Rows added to the rows of their numbers."""
    base, _, chosen, values = arguments(node)[:4]
    found, picks, given = (known.of(each) for each in (base, chosen, values))
    if found is None or picks is None or given is None or len(picks.axes) != 1:
        return None
    axis = named_axis(node)
    _lines_up(known, node, base, values, axis)
    known.extents.match(picks.axes[0], given.axes[axis], node)
    known.match_numbers(picks.numbers, found.axes[axis], node)
    known.computed_with(base, node)
    known.computed_with(values, node)
    return Meaning(found.axes)


def put(known: Meanings, node: fx.Node) -> Meaning | None:
    """Rows put, or added, where numbers or a mask say."""
    base, indices, values = arguments(node)[:3]
    found, given = known.of(base), known.of(values)
    picks = [known.of(each) for each in indices]
    if found is None or given is None or None in picks:
        return None
    known.computed_with(base, node)
    known.computed_with(values, node)
    chosen = [each for each in picks if each is not None]
    rank = len(indices)
    if indices[0].meta["val"].dtype is torch.bool:
        rank = len(chosen[0].axes)
        broadcast(known, [found.axes[:rank], chosen[0].axes], shape_of(indices[0]), node)
        if len(indices) > 1 or shape_of(values)[:-1]:
            known.extents.mark([*chosen[0].axes, *given.axes], node)
        return Meaning(found.axes)
    for place, each in enumerate(chosen):
        known.match_numbers(None if each.partly else each.numbers, found.axes[place], node)
    shape = max((shape_of(each) for each in indices), key=len)
    rows = broadcast(known, [each.axes for each in chosen], shape, node)
    if not argument(node, 3, "accumulate", False):
        known.extents.mark(rows, node)
    broadcast(known, [(*rows, *found.axes[rank:]), given.axes], (*shape, *shape_of(base)[rank:]), node)
    return Meaning(found.axes)


def listed(known: Meanings, node: fx.Node) -> Meaning | None:
    """`nonzero`: the numbers of the entries that are not 0, side by side."""
    found = known.of(arguments(node)[0])
    if found is None:
        return None
    known.extents.mark(found.axes, node)
    rows, columns = shape_of(node)
    axes = (known.extents.new(rows, order=node, role=LISTED), known.extents.new(columns, order=node))
    return Meaning(axes, columns=found.axes)


def listed_apart(known: Meanings, node: fx.Node) -> tuple[Meaning, ...] | None:
    """The same as a tuple."""
    found = known.of(arguments(node)[0])
    if found is None:
        return None
    known.extents.mark(found.axes, node)
    rows = known.extents.new(node.meta["val"][0].shape[0], order=node, role=LISTED)
    return tuple(Meaning((rows,), numbers=axis) for axis in found.axes)


def sorted_along(known: Meanings, node: fx.Node) -> Meaning | tuple[Meaning, ...] | None:
    """Entries in the order of their values, and their numbers before that."""
    source = arguments(node)[0]
    found = known.of(source)
    if found is None or not found.axes:
        return None
    axis = named_axis(node)
    along, axes = found.axes[axis], list(found.axes)
    if not source.meta["val"].dtype.is_floating_point:  # of equal ones the first comes first
        known.extents.mark([along], node)
    role = LISTED if found.numbers else "rank"
    axes[axis] = known.extents.new(shape_of(source)[axis], order=node, role=role)
    numbers = Meaning(tuple(axes), numbers=along)
    if node.target in (_aten.argsort.default, _aten.argsort.stable):
        return numbers
    return dataclasses.replace(known.whole(found, node), axes=tuple(axes)), numbers


def chosen(known: Meanings, node: fx.Node) -> Meaning | tuple[Meaning, ...] | None:
    """`topk`, `max`, `argmax` along an axis: the largest entries, and their numbers."""
    source = arguments(node)[0]
    found, is_topk = known.of(source), node.target is _aten.topk.default
    axes_along = named_axes(node)
    if found is None or len(axes_along) != 1:
        return None
    (axis,) = axes_along
    along, axes = found.axes[axis], list(found.axes)
    if not source.meta["val"].dtype.is_floating_point:
        known.extents.mark([along], node)
    value = node.meta["val"]
    shape = tuple((value if isinstance(value, torch.Tensor) else value[0]).shape)
    if is_topk:
        axes[axis] = known.extents.new(shape[axis], order=node, role="slot")
    elif len(shape) == len(axes):
        axes[axis] = ()
    else:
        del axes[axis]
    numbers = Meaning(tuple(axes), numbers=along)
    return numbers if isinstance(value, torch.Tensor) else (Meaning(tuple(axes)), numbers)


def one_hot(known: Meanings, node: fx.Node) -> Meaning | None:
    """1 where a number is the place along a new axis."""
    found = known.of(arguments(node)[0])
    if found is None:
        return None
    axis, size = found.numbers, shape_of(node)[-1]
    if axis is None or not same_size(size_of(axis), size):
        known.computed_with(arguments(node)[0], node)
        axis = known.extents.new(size, order=node, role="capacity slot" if found.running else "")
    return Meaning((*found.axes, axis))


def counted(known: Meanings, node: fx.Node) -> Meaning | None:
    """How often each number occurs: `bincount` and `histc`."""
    source = arguments(node)[0]
    found, size = known.of(source), shape_of(node)[0]
    if found is None:
        return None
    if node.target is _aten.histc.default:
        bins, low, high = (*arguments(node)[1:], 100, 0, 0)[:3]
        whole_range = low == 0 and high == bins - 1
    else:
        bins, whole_range = argument(node, 2, "minlength", 0), argument(node, 1, "weights") is None
    if found.numbers is not None and whole_range and same_size(size_of(found.numbers), bins):
        return Meaning((found.numbers,))
    known.computed_with(source, node)
    if argument(node, 1, "weights") is not None:
        for each in node.all_input_nodes:
            known.used(each, node)
    return known.anew([size], node)


def compared(known: Meanings, node: fx.Node) -> Meaning | None:
    """Numbers compared with numbers: `idx[..., None] == arange(E)`; what a running count is compared with are slots."""
    found = pointwise(known, node)
    if found is None:
        return None
    given = [known.of(each) for each in arguments(node)]
    numbers = [each.numbers for each in given if each is not None and each.numbers is not None]
    if len(numbers) == 2:
        known.match_numbers(numbers[0], numbers[1], node)
    else:
        if numbers and any(each is not None and each.running for each in given):
            known.extents.call(numbers[0], "capacity slot")
        for each in node.all_input_nodes:
            known.computed_with(each, node)
    return dataclasses.replace(found, running=False)


def where(known: Meanings, node: fx.Node) -> Meaning | None:
    """One of two; numbers, if both are numbers of the same, or the other is below 0."""
    found = lined_up(known, node, node.all_input_nodes)
    condition, one, other = arguments(node)
    first, second = known.of(one), known.of(other)
    if found is None:
        return None
    known.computed_with(condition, node)
    if first is not None and first.numbers is not None:
        numbered = second is not None and second.numbers is not None
        if second is not None and numbered and known.match_numbers(first.numbers, second.numbers or (), node):
            return dataclasses.replace(found, numbers=first.numbers, partly=first.partly or second.partly)
        if _is_below_0(other):
            return dataclasses.replace(found, numbers=first.numbers, partly=True)
    for each in (one, other):
        if isinstance(each, fx.Node):
            known.computed_with(each, node)
    return found


def _is_below_0(value: Any) -> bool:
    if isinstance(value, fx.Node):
        at = FULL.get(value.target)
        value = arguments(value)[at] if at is not None else 0
    return isinstance(value, (int, float)) and value < 0


def divided(known: Meanings, node: fx.Node) -> Meaning | None:
    """Numbers of pairs, divided by how many slots a token has: those of tokens; the rest: those of slots."""
    source, by = arguments(node)[:2]
    found, made = known.of(source), pointwise(known, node)
    if found is None or made is None:
        return None
    size = by.meta["val"] if isinstance(by, fx.Node) else by
    rounds = node.target is not _aten.div.Tensor_mode or node.kwargs.get("rounding_mode") in (
        "floor",
        "trunc",
    )
    axis = known.extents.of(found.numbers or ())
    for place in range(1, len(axis)) if rounds and not found.partly else ():
        if same_size(size_of(axis[place:]), size):
            rest = node.target is _aten.remainder.Scalar
            return dataclasses.replace(made, numbers=axis[place:] if rest else axis[:place])
    for each in node.all_input_nodes:
        known.computed_with(each, node)
    return made
