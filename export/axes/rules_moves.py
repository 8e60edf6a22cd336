"""Operators that move entries without changing any: what the axes of their results run over (rules of `axes/rules`)."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.extents import Axis
from moe_export.export.axes.meaning import Meaning, Meanings
from moe_export.export.axes.shapes import arguments, named_axes, named_axis, order_of, rank_of, shape_of
from moe_export.export.sizes import same_shape, same_size

_aten = torch.ops.aten
GETITEM = operator.getitem


def same(known: Meanings, node: fx.Node) -> Meaning | None:
    """A copy or a cast: numbers stay numbers, unless they become truth values."""
    found = known.of(arguments(node)[0])
    if found is None or node.meta["val"].dtype is not torch.bool:
        return found
    known.computed_with(arguments(node)[0], node)
    return dataclasses.replace(found, numbers=None, partly=False, columns=())


def like(known: Meanings, node: fx.Node) -> Meaning | None:
    """Values all alike, of the shape of another."""
    found = known.of(arguments(node)[0])
    return Meaning(found.axes) if found is not None else None


def made(known: Meanings, node: fx.Node) -> Meaning:
    """Values all alike."""
    return known.anew(shape_of(node))


def reshaped(known: Meanings, node: fx.Node) -> Meaning | None:
    found = known.of(arguments(node)[0])
    if found is None:
        return None
    axes = known.extents.reshaped(found.axes, shape_of(node), node)
    return dataclasses.replace(known.whole(found, node), axes=axes)


def permuted(known: Meanings, node: fx.Node) -> Meaning | None:
    source = arguments(node)[0]
    found, order = known.of(source), order_of(node)
    if found is None:
        return None
    return dataclasses.replace(known.whole(found, node), axes=tuple(found.axes[axis] for axis in order))


def squeezed(known: Meanings, node: fx.Node) -> Meaning | None:
    found = known.of(arguments(node)[0])
    if found is None:
        return None
    kept = list(range(len(found.axes)))
    if len(kept) != rank_of(node):
        wanted = named_axes(node) or kept
        kept = [axis for axis in kept if axis not in wanted or found.axes[axis]]
    if len(kept) != rank_of(node):
        return None
    return dataclasses.replace(known.whole(found, node), axes=tuple(found.axes[axis] for axis in kept))


def unsqueezed(known: Meanings, node: fx.Node) -> Meaning | None:
    found = known.of(arguments(node)[0])
    if found is None:
        return None
    axis = named_axis(node)
    return dataclasses.replace(known.whole(found, node), axes=(*found.axes[:axis], (), *found.axes[axis:]))


def expanded(known: Meanings, node: fx.Node) -> Meaning | None:
    """An axis of size 1 becomes one along which all entries are alike."""
    found = known.of(arguments(node)[0])
    if found is None:
        return None
    added = rank_of(node) - len(found.axes)
    old = ((),) * added + found.axes
    sizes = ((1,) * added) + shape_of(arguments(node)[0])
    axes = tuple(
        axis if same_size(before, size) else known.extents.new(size)
        for axis, before, size in zip(old, sizes, shape_of(node), strict=True)
    )
    return dataclasses.replace(known.whole(found, node), axes=axes)


def repeated(known: Meanings, node: fx.Node) -> Meaning | None:
    """`repeat`: what is repeated is the faster part of an axis."""
    found, times = known.of(arguments(node)[0]), arguments(node)[1]
    if found is None:
        return None
    times = [each.meta["val"] if isinstance(each, fx.Node) else each for each in times]
    old = ((),) * (len(times) - len(found.axes)) + found.axes
    axes = tuple((*known.extents.new(count), *axis) for count, axis in zip(times, old, strict=True))
    return dataclasses.replace(known.whole(found, node), axes=axes)


def interleaved(known: Meanings, node: fx.Node) -> Meaning | None:
    """`repeat_interleave` by one number: what is repeated is the slower part of the axis."""
    found, times, along = known.of(arguments(node)[0]), arguments(node)[1], named_axes(node)
    times = times.meta["val"] if isinstance(times, fx.Node) else times
    if found is None or len(along) != 1:
        return None
    axes, (place,) = list(found.axes), along
    axes[place] = (*axes[place], *known.extents.new(times))
    return dataclasses.replace(known.whole(found, node), axes=tuple(axes))


def padded(known: Meanings, node: fx.Node) -> Meaning | None:
    """Padding: other entries at the ends of some axes."""
    found, pads = known.of(arguments(node)[0]), arguments(node)[1]
    if found is None or rank_of(node) != len(found.axes):
        return None
    pads = [each.meta["val"] if isinstance(each, fx.Node) else each for each in pads]
    axes = list(found.axes)
    for place in range(len(pads) // 2):
        if pads[2 * place] or pads[2 * place + 1]:
            axis = len(axes) - 1 - place
            known.extents.mark([axes[axis]], node)
            axes[axis] = known.extents.new(shape_of(node)[axis], order=node)
    known.computed_with(arguments(node)[0], node)
    return Meaning(tuple(axes))


def selected(known: Meanings, node: fx.Node) -> Meaning | None:
    source, _, place = arguments(node)[:3]
    found = known.of(source)
    return _without(known, node, found, place) if found is not None else None


def _without(known: Meanings, node: fx.Node, found: Meaning, place: object) -> Meaning:
    """One entry along an axis; of columns, the numbers that it has."""
    axis = named_axis(node)
    left = dataclasses.replace(found, axes=found.axes[:axis] + found.axes[axis + 1 :])
    if found.columns and axis == len(found.axes) - 1 and isinstance(place, int):
        return dataclasses.replace(left, columns=(), numbers=found.columns[place])
    known.extents.mark([found.axes[axis]], node)
    return left


def sliced(known: Meanings, node: fx.Node) -> Meaning | None:
    source = arguments(node)[0]
    found = known.of(source)
    if found is None or same_shape(shape_of(node), shape_of(source)):
        return found
    return _shortened(known, node, found, shape_of(node))


def _shortened(known: Meanings, node: fx.Node, found: Meaning, sizes: Sequence[Any]) -> Meaning:
    """Some entries along an axis, picked by where they stand."""
    (axis,), columns = named_axes(node), found.columns
    if columns and axis == len(found.axes) - 1:
        known.extents.mark(columns, node)
        columns = ()
    known.extents.mark([found.axes[axis]], node)
    axes: list[Axis] = list(found.axes)
    axes[axis] = known.extents.new(sizes[axis], order=node)
    return dataclasses.replace(found, axes=tuple(axes), columns=columns)


def parts(known: Meanings, node: fx.Node) -> tuple[Meaning, ...] | None:
    """`split` and `chunk`: pieces along an axis; of columns one by one, the numbers that each has."""
    found, each_part = known.of(arguments(node)[0]), node.meta["val"]
    if found is None:
        return None
    last = named_axes(node) == (len(found.axes) - 1,)
    if found.columns and last and len(each_part) == len(found.columns):
        alone = (*found.axes[:-1], ())
        return tuple(Meaning(alone, numbers=column) for column in found.columns)
    return tuple(_shortened(known, node, found, each.shape) for each in each_part)


def unbound(known: Meanings, node: fx.Node) -> tuple[Meaning, ...] | None:
    found = known.of(arguments(node)[0])
    if found is None:
        return None
    return tuple(_without(known, node, found, place) for place in range(len(node.meta["val"])))


def part(known: Meanings, node: fx.Node) -> Meaning | None:
    source, place = arguments(node)
    found = known.found.get(source)
    return found[place] if found is not None and isinstance(place, int) else None


def joined(known: Meanings, node: fx.Node) -> Meaning | None:
    """`cat` and `stack`: all other axes are lined up."""
    given = [each for each in arguments(node)[0] if not _is_empty(each)]
    found, (axis,) = [known.of(each) for each in given], named_axes(node)
    if not found or any(each is None for each in found):
        return None
    first, *others = [each for each in found if each is not None]
    axes = list(first.axes)
    size = shape_of(node)[axis]
    if node.target is _aten.stack.default:
        axes.insert(axis, known.extents.new(size, order=node))
    elif others:
        known.extents.mark([each.axes[axis] for each in (first, *others)], node)
        axes[axis] = known.extents.new(size, order=node)
    for other in others:
        own = list(other.axes)
        if node.target is _aten.stack.default:
            own.insert(axis, ())
        for place, (one, two) in enumerate(zip(axes, own, strict=True)):
            if place != axis:
                known.extents.match(one, two, node)
    numbers = first.numbers
    for other in others:
        if numbers is None or other.numbers is None or not known.match_numbers(numbers, other.numbers, node):
            numbers = None
    if numbers is None or any(each.columns for each in (first, *others)):
        numbers = None
        for source in given:
            known.computed_with(source, node)
    partly = any(each.partly for each in (first, *others))
    is_running = any(each.running for each in (first, *others))
    return Meaning(tuple(axes), numbers=numbers, partly=partly, running=is_running)


def _is_empty(value: fx.Node) -> bool:
    """Whether it is the empty vector that `cat` takes beside anything."""
    return len(shape_of(value)) == 1 and same_size(shape_of(value)[0], 0)
