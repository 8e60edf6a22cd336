"""Operators that combine entries: elementwise, along an axis, in products (rules of `axes/rules`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.extents import Axis
from moe_export.export.axes.letters import letters_of
from moe_export.export.axes.meaning import Meaning, Meanings
from moe_export.export.axes.shapes import argument, arguments, named_axes, named_axis, rank_of, shape_of
from moe_export.export.sizes import same_size

_aten = torch.ops.aten


def pointwise(known: Meanings, node: fx.Node) -> Meaning | None:
    """Operands are lined up from the right; one of size 1 is the same for all entries."""
    return lined_up(known, node, node.all_input_nodes)


def lined_up(known: Meanings, node: fx.Node, sources: Sequence[fx.Node]) -> Meaning | None:
    """What an elementwise operator gives for these operands."""
    given = [known.of(source) for source in sources if shape_of(source) or known.of(source) is not None]
    if not given or any(each is None for each in given):
        return None
    found = [each for each in given if each is not None]
    running = any(each.running for each in found) and node.meta["val"].dtype is not torch.bool
    return Meaning(broadcast(known, [each.axes for each in found], shape_of(node), node), running=running)


def broadcast(
    known: Meanings, given: Sequence[Sequence[Axis]], sizes: Sequence[Any], by: fx.Node
) -> tuple[Axis, ...]:
    """Axes lined up from the right, to a shape."""
    rank, result = len(sizes), []
    for place, size in enumerate(sizes):
        own = [axes[place - rank + len(axes)] for axes in given if place - rank + len(axes) >= 0]
        spread = [axis for axis in own if axis]
        for other in spread[1:]:
            known.extents.match(spread[0], other, by)
        result.append(spread[0] if spread else known.extents.new(size))
    return tuple(result)


def kept(known: Meanings, node: fx.Node) -> Meaning | None:
    """An operator along an axis that keeps it: a softmax."""
    found = known.of(arguments(node)[0])
    return dataclasses.replace(found, numbers=None, columns=()) if found is not None else None


def norm(known: Meanings, node: fx.Node) -> Meaning | None:
    """A norm along the last axes, with weights of its own for these."""
    found = known.of(arguments(node)[0])
    if found is None:
        return None
    for weight in arguments(node)[2:4]:
        own = known.of(weight)
        if own is not None:
            broadcast(known, [found.axes, own.axes], shape_of(node), node)
    return Meaning(found.axes)


def reduced(known: Meanings, node: fx.Node) -> Meaning | None:
    """Added up along some axes, or the largest, or whether there is any."""
    found = known.of(arguments(node)[0])
    if found is None:
        return None
    dims = named_axes(node)
    keeps = rank_of(node) == len(found.axes) and bool(dims)
    axes = [() if place in dims else axis for place, axis in enumerate(found.axes)]
    if not keeps:
        axes = [axis for place, axis in enumerate(axes) if place not in dims]
    return Meaning(tuple(axes), running=found.running)


def reduced_to_one(known: Meanings, node: fx.Node) -> Meaning | None:
    return Meaning(()) if known.of(arguments(node)[0]) is not None and not shape_of(node) else None


def running(known: Meanings, node: fx.Node) -> Meaning | None:
    """A running sum or product: the order matters. One of whole numbers is a count."""
    source = arguments(node)[0]
    found = known.of(source)
    if found is None or not found.axes:
        return found
    along = found.axes[named_axis(node)]
    known.extents.mark([along], node)
    counts = not source.meta["val"].dtype.is_floating_point
    if not counts:
        known.extents.call(along, "time step")
    return Meaning(found.axes, running=counts or found.running)


def kept_in_order(known: Meanings, node: fx.Node) -> Meaning | None:
    """`flip`, `roll`, `tril`: entries stay or move by where they stand."""
    found = known.of(arguments(node)[0])
    if found is not None:
        known.used(arguments(node)[0], node)
    return Meaning(found.axes) if found is not None else None


def matmul(known: Meanings, node: fx.Node) -> Meaning | None:
    one, other = (known.of(each) for each in arguments(node)[:2])
    return _product(known, node, one, other)


def _product(known: Meanings, node: fx.Node, one: Meaning | None, other: Meaning | None) -> Meaning | None:
    if one is None or other is None or not one.axes or not other.axes:
        return None
    left, right = list(one.axes), list(other.axes)
    known.extents.match(left[-1], right[-2 if len(right) > 1 else -1], node)
    outer = [left[-2]] if len(left) > 1 else []
    outer += [right[-1]] if len(right) > 1 else []
    sizes = shape_of(node)[: rank_of(node) - len(outer)]
    return Meaning((*broadcast(known, [left[:-2], right[:-2]], sizes, node), *outer))


def linear(known: Meanings, node: fx.Node) -> Meaning | None:
    """(..., a) with weights (b, a) and biases (b)."""
    found, weight = (known.of(each) for each in arguments(node)[:2])
    if found is None or weight is None or len(weight.axes) != 2:
        return None
    known.extents.match(found.axes[-1], weight.axes[1], node)
    return _plus(known, node, (*found.axes[:-1], weight.axes[0]), argument(node, 2, "bias"))


def addmm(known: Meanings, node: fx.Node) -> Meaning | None:
    bias, left, right = arguments(node)[:3]
    found = _product(known, node, known.of(left), known.of(right))
    return _plus(known, node, found.axes, bias) if found is not None else None


def _plus(known: Meanings, node: fx.Node, axes: tuple[Axis, ...], bias: object) -> Meaning:
    own = known.of(bias)
    return Meaning(broadcast(known, [axes, own.axes] if own is not None else [axes], shape_of(node), node))


def einsum(known: Meanings, node: fx.Node) -> Meaning | None:
    """One axis a letter."""
    read = letters_of(node)
    found: dict[str, Axis] = {}
    for operand, term in zip(read.operands, read.terms, strict=True):
        given = known.of(operand)
        if given is None:
            return None
        for letter, axis in zip(term, given.axes, strict=True):
            if found.get(letter) and axis:
                known.extents.match(found[letter], axis, node)
            found[letter] = found.get(letter) or axis
    return Meaning(tuple(found[letter] for letter in read.out))


def attention(known: Meanings, node: fx.Node) -> Meaning | None:
    """(..., queries, d), (..., keys, d), (..., keys, v) → (..., queries, v)."""
    query, key, value = (known.of(each) for each in arguments(node)[:3])
    if query is None or key is None or value is None:
        return None
    *own, queries, width = query.axes
    *others, keys, wide = key.axes
    known.extents.match(width, wide, node)
    known.extents.match(keys, value.axes[-2], node)
    mask = known.of(argument(node, 3, "attn_mask"))
    if argument(node, 5, "is_causal", False):
        known.extents.mark([queries, keys], node)
    if mask is not None:
        broadcast(known, [(*own, queries, keys), mask.axes], (*shape_of(node)[:-1], 0), node)
    lead = broadcast(known, [own, others, value.axes[:-2]], shape_of(node)[:-2], node)  # heads may share keys
    return Meaning((*lead, queries, value.axes[-1]))


def convolved(known: Meanings, node: fx.Node) -> Meaning | None:
    """(b, channels, ...) with weights (channels', ...): the order of steps and of channels matters."""
    found, weight = (known.of(each) for each in arguments(node)[:2])
    turned = node.target is _aten.convolution.default and arguments(node)[6]
    if found is None or weight is None or rank_of(node) != len(weight.axes) or turned:
        return None
    for source in node.all_input_nodes[1:]:
        known.used(source, node)
    batch, *rest = found.axes if len(found.axes) == rank_of(node) else ((), *found.axes)
    known.extents.mark(rest, node)
    if len(rest) == 2:  # (channels, steps)
        known.extents.call(rest[-1], "time step")
    kept_axes = [
        axis if same_size(before, after) else known.extents.new(after, order=node)
        for axis, before, after in zip(rest[1:], shape_of(arguments(node)[0])[-len(rest) + 1 :], shape_of(node)[2:],
                                       strict=True)
    ]  # fmt: skip
    return Meaning((batch, weight.axes[0], *kept_axes))
