"""What each axis of a value in a mask computation runs over, followed from a result to what it was computed from.

GShard's masks (N, E, C) are built from values over tokens, experts and slots in any order of axes. The einsum that
uses a mask says what its axes are; every operator before it passes that on to its inputs.

Labels: "s" token, "g0", "g1" groups of tokens, "e" expert, "c" slot of an expert, "k" choice of a token. An axis has
several labels if a reshape merged axes, and none if its size is 1.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.letters import letters_of
from moe_export.export.axes.operators import CASTS, TURNS, VIEWS
from moe_export.export.axes.shapes import (
    arguments,
    is_numbering,
    named_axes,
    named_axis,
    order_of,
    rank_of,
    shape_of,
)
from moe_export.export.axes.support import constant_of
from moe_export.export.sizes import fixed, same_size

_aten = torch.ops.aten
_SCATTERS = {_aten.scatter.value, _aten.scatter_.value}
Axis = tuple[str, ...]

FIXED = "#"
"""Begins the label of an axis at which one index is selected: "#1"."""


@dataclass(frozen=True)
class View:
    """A value, and what its axes run over."""

    node: fx.Node
    axes: tuple[Axis, ...]

    @property
    def labels(self) -> frozenset[str]:
        """The labels of all axes."""
        return frozenset(label for axis in self.axes for label in axis)


@dataclass(frozen=True)
class Labels:
    """The labels of one block.

    Attributes:
        sizes: The size that each label stands for.
        value_numbers: Each node → the first node that computes the same.
    """

    sizes: dict[str, Any]
    value_numbers: Mapping[fx.Node, fx.Node]

    def note(self, label: str, size: Any) -> None:
        """Record the size of a label that was found on the way, unless it is known already."""
        self.sizes.setdefault(label, size)

    def peeled(self, view: View, *, values: bool = False) -> View:
        """The value that this one is a rearrangement or cast of.

        Args:
            view: Any value.
            values: Stop at a cast that may change values: to integers or to bool.
        """
        while True:
            inner = self._inner(view)
            if inner is None or (values and _rounds(view.node)):
                return View(self.value_numbers.get(view.node, view.node), view.axes)
            view = inner

    def operands(self, view: View) -> list[View] | None:
        """The tensor operands of an elementwise operator, with the axes that they are aligned with from the right.

        None if one of them has more axes than the result.
        """
        found = []
        for node in view.node.all_input_nodes:
            if isinstance(node.meta.get("val"), torch.Tensor):
                if rank_of(node) > len(view.axes):
                    return None
                found.append(self.aligned(node, view))
        return found

    def aligned(self, node: fx.Node, view: View) -> View:
        """An operand of an elementwise operator, with the axes of its result that it is aligned with; () for an axis of
        size 1 that is broadcast.
        """
        sizes = shape_of(node)
        axes = view.axes[len(view.axes) - len(sizes) :]
        outer = shape_of(view.node)[len(view.axes) - len(sizes) :]
        spread = [
            same_size(size, 1) and not same_size(out, 1) for size, out in zip(sizes, outer, strict=True)
        ]
        return View(node, tuple(() if is_one else axis for axis, is_one in zip(axes, spread, strict=True)))

    def _inner(self, view: View) -> View | None:
        node = view.node
        source = arguments(node)[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, fx.Node):
            return None
        rule = _RULES.get(node.target)
        if node.target in CASTS:
            return View(source, view.axes)
        if node.target is operator.getitem and source.target is _aten.unbind.int:
            return _at(view, arguments(source)[0], source, arguments(node)[1])
        if node.target in VIEWS:
            axes = self.reshaped(view.axes, shape_of(source))
            return None if axes is None else View(source, axes)
        return rule(view, source) if rule is not None else None

    def reshaped(self, axes: Sequence[Axis], sizes: Sequence[object]) -> tuple[Axis, ...] | None:
        """The axes after a reshape to these sizes, or before a reshape from them; None if labels have to be split."""
        labels = [label for axis in axes for label in axis]
        if any(label not in self.sizes for label in labels):
            return None
        found: list[Axis] = []
        for size in sizes:
            group: list[str] = []
            product: Any = 1
            while not same_size(product, size):
                if not labels:
                    return None
                group.append(labels.pop(0))
                product = product * self.sizes[group[-1]]
            found.append(tuple(group))
        while labels and same_size(self.sizes[labels[0]], 1):
            labels.pop(0)
        return None if labels else tuple(found)


def _rounds(node: fx.Node) -> bool:
    """Whether a cast is to integers or bool, and so loses more than precision."""
    before, after = arguments(node)[0].meta["val"], node.meta["val"]
    return (
        node.target in CASTS
        and before.dtype is not torch.bool
        and after.dtype is not before.dtype
        and not after.dtype.is_floating_point
    )


def _unsqueezed(view: View, source: fx.Node) -> View:
    axis = named_axis(view.node)
    return View(source, view.axes[:axis] + view.axes[axis + 1 :])


def _squeezed(view: View, source: fx.Node) -> View | None:
    if rank_of(source) == len(view.axes):
        return View(source, view.axes)
    along = named_axes(view.node)
    return View(source, with_axis(view.axes, along[0], ())) if len(along) == 1 else None


def _turned(view: View, source: fx.Node) -> View:
    axes: list[Axis] = [()] * len(view.axes)
    for place, axis in enumerate(order_of(view.node)):
        axes[axis] = view.axes[place]
    return View(source, tuple(axes))


def _expanded(view: View, source: fx.Node) -> View:
    sizes, outer = shape_of(source), shape_of(view.node)[len(view.axes) - rank_of(source) :]
    axes = view.axes[len(view.axes) - rank_of(source) :]
    same = map(same_size, sizes, outer)
    return View(source, tuple(axis if is_same else () for axis, is_same in zip(axes, same, strict=True)))


def _selected(view: View, source: fx.Node) -> View | None:
    return _at(view, source, view.node, arguments(view.node)[2])


def _at(view: View, source: fx.Node, by: fx.Node, index: object) -> View | None:
    """One entry along the axis that an operator names."""
    is_known = isinstance(index, int)
    return View(source, with_axis(view.axes, named_axis(by), (f"{FIXED}{index}",))) if is_known else None


_RULES: dict[Any, Any] = {
    _aten.unsqueeze.default: _unsqueezed,
    _aten.squeeze.dim: _squeezed,
    _aten.squeeze.dims: _squeezed,
    **dict.fromkeys(TURNS, _turned),
    _aten.expand.default: _expanded,
    _aten.select.int: _selected,
}


def marked(view: View, label: str, labels: Labels, several: str = "") -> tuple[View, Any] | None:
    """The integers of a mask that is 1 where they are the place along the axis with this label, and how many there are.

        one_hot(x, E)        x[..., None] == arange(E)        zeros(N, E).scatter(1, x, 1)

    Args:
        view: Any value.
        label: The label of one of its axes.
        labels: Of the block.
        several: The label of an axis of several integers, each of which sets its place; empty to take none of these.

    Returns:
        The number, or the node that computes it, is None where it is not seen. None for any other value.
    """
    node, args = view.node, arguments(view.node)
    if node.target is _aten.one_hot.default and view.axes[-1:] == ((label,),):
        return labels.peeled(View(args[0], view.axes[:-1])), args[1]
    if node.target in _SCATTERS and args[3] == 1 and constant_of(args[0]) == 0:
        zeros, (axis,), index = args[0], named_axes(node), args[2]
        is_one = same_size(shape_of(index)[axis], 1)
        if view.axes[axis] != (label,) or not (
            is_one or (several and fixed(shape_of(index)[axis]) is not None)
        ):
            return None
        chosen = View(index, with_axis(view.axes, axis, () if is_one else (several,), instead=True))
        sizes = {_aten.zeros.default: 0, _aten.new_zeros.default: 1}.get(zeros.target)
        return labels.peeled(chosen), None if sizes is None else arguments(zeros)[sizes][axis]
    operands = (labels.operands(view) or []) if node.target is _aten.eq.Tensor else []
    for one, other in (operands, operands[::-1]) if len(operands) == 2 else ():
        numbers, integers = labels.peeled(other), labels.peeled(one)
        if is_numbering(numbers.node) and numbers.labels == {label} and label not in integers.labels:
            ends = arguments(numbers.node)
            return integers, ends[0] if numbers.node.target is _aten.arange.default else ends[1]
    return None


def product_of(view: View, over: str = "") -> list[View] | None:
    """The factors of an einsum that only multiplies, or that also sums over one letter if `over` is its label.

    None for any other einsum.
    """
    read = letters_of(view.node)
    axes: dict[str, Axis] = dict(zip(read.out, view.axes, strict=True))
    summed = {letter for term in read.terms for letter in term} - set(read.out)
    if len(summed) != bool(over) or not read.is_plain:
        return None
    axes |= dict.fromkeys(summed, (over,))
    return [
        View(node, tuple(axes[letter] for letter in term))
        for node, term in zip(read.operands, read.terms, strict=True)
    ]


def summed_over(view: View, label: str) -> Iterator[View]:
    """What a reduction over exactly one axis reduces, with `label` for that axis; nothing for any other."""
    source, along = arguments(view.node)[0], named_axes(view.node)
    if len(along) == 1:
        kept = rank_of(source) == len(view.axes)
        yield View(source, with_axis(view.axes, along[0], (label,), instead=kept))


def with_axis(axes: Sequence[Axis], place: int, axis: Axis, *, instead: bool = False) -> tuple[Axis, ...]:
    """Axes with one more at a place, or another one there."""
    return (*axes[:place], axis, *axes[place + instead :])
