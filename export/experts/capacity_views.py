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

from moe_export.export.axes.operators import CASTS, TURNS, VIEWS
from moe_export.export.axes.shapes import argument, arguments, order_of, rank_of, shape_of
from moe_export.export.sizes import same_size

_aten = torch.ops.aten
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
            return _of_unbind(view, source)
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
    axis = int(arguments(view.node)[1]) % len(view.axes)
    return View(source, view.axes[:axis] + view.axes[axis + 1 :])


def _squeezed(view: View, source: fx.Node) -> View | None:
    if rank_of(source) == len(view.axes):
        return View(source, view.axes)
    axis: Any = arguments(view.node)[1]
    if isinstance(axis, (list, tuple)):
        if len(axis) != 1:
            return None
        axis = axis[0]
    axis %= rank_of(source)
    return View(source, (*view.axes[:axis], (), *view.axes[axis:]))


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
    axis, index = arguments(view.node)[1:3]
    if not isinstance(index, int):
        return None
    axis %= rank_of(source)
    return View(source, (*view.axes[:axis], (f"{FIXED}{index}",), *view.axes[axis:]))


def _of_unbind(view: View, unbind: fx.Node) -> View:
    source, *rest = arguments(unbind)
    axis = int(rest[0] if rest else 0) % rank_of(source)
    label = f"{FIXED}{arguments(view.node)[1]}"
    return View(source, (*view.axes[:axis], (label,), *view.axes[axis:]))


_RULES: dict[Any, Any] = {
    _aten.unsqueeze.default: _unsqueezed,
    _aten.squeeze.dim: _squeezed,
    _aten.squeeze.dims: _squeezed,
    **dict.fromkeys(TURNS, _turned),
    _aten.expand.default: _expanded,
    _aten.select.int: _selected,
}


def product_of(view: View, over: str = "") -> list[View] | None:
    """The factors of an einsum that only multiplies, or that also sums over one letter if `over` is its label.

    None for any other einsum.
    """
    equation, operands = str(arguments(view.node)[0]).replace(" ", ""), list(arguments(view.node)[1])
    terms, arrow, out = equation.partition("->")
    if not arrow or "." in equation or len(set(out)) < len(out) or len(out) != len(view.axes):
        return None
    axes: dict[str, Axis] = dict(zip(out, view.axes, strict=True))
    letters = terms.split(",")
    summed = sorted({letter for term in letters for letter in term} - set(out))
    if len(summed) != bool(over) or any(len(set(term)) < len(term) for term in letters):
        return None
    axes.update((letter, (over,)) for letter in summed)
    return [
        View(node, tuple(axes[letter] for letter in term))
        for node, term in zip(operands, letters, strict=True)
    ]


def summed_over(view: View, label: str) -> Iterator[View]:
    """What a reduction over exactly one axis reduces, with `label` for that axis; nothing for any other."""
    args = arguments(view.node)
    dims = _dims(view.node)
    if len(dims) != 1 or len(args) < 2:
        return
    keeps = argument(view.node, 2, "keepdim", False)
    axes = list(view.axes)
    axis = dims[0] % rank_of(args[0])
    if keeps:
        axes.pop(axis)
    yield View(args[0], (*axes[:axis], (label,), *axes[axis:]))


def _dims(node: fx.Node) -> list[int]:
    dims = (*arguments(node), None, None)[1]
    return [int(dim) for dim in (dims if isinstance(dims, (list, tuple)) else [dims]) if dim is not None]
