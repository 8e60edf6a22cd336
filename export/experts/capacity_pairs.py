"""What a mask holds for every pair of a token and a choice: values (N, k) instead of (N, E, C).

A term of a mask is computed from values over tokens and experts; what it holds for a pair is theirs at the chosen
expert. Labels: `capacity_views`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.shapes import arguments
from moe_export.export.experts.capacity_terms import NotSparseError, Proved, Step
from moe_export.export.experts.capacity_views import FIXED, Axis, Labels, View
from moe_export.export.experts.derived import derived
from moe_export.export.experts.notes import named
from moe_export.export.sizes import fixed

_aten = torch.ops.aten


class PairWriter:
    """Values of pairs, of the block that ends at one node.

    Args:
        end: That node.
        labels: Of the block.
    """

    def __init__(self, end: fx.Node, labels: Labels) -> None:
        self._end = end
        self._labels = labels
        self._lead = [*sorted(label for label in labels.sizes if label.startswith("g")), "s"]
        self.dtype: torch.dtype = end.meta["val"].dtype

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write one operator."""
        return derived(self._end, target, *args, **kwargs)

    def indices(self, pair: Proved) -> fx.Node:
        """(g, s, k): the chosen experts."""
        return self._ordered(pair.choice.indices, ["k"])

    def value(self, pair: Proved) -> fx.Node:
        """(g, s, k): what a term's mask holds for its pairs; 0 where the slot does not exist."""
        indices = self.indices(pair)
        value: fx.Node | None = None
        for step in pair.term.steps:
            value = self._after(value, step, indices)
        if value is None:
            value = self.call(_aten.ones_like.default, indices, dtype=self.dtype)
        if pair.bounded:
            return value
        exists = self.call(_aten.lt.Scalar, self._at(pair.term.place, indices), pair.term.slots)
        return self.call(_aten.mul.Tensor, value, self._cast(exists))

    def flat(self, parts: Sequence[fx.Node], width: int | None = None) -> fx.Node:
        """(g, s, k) of each term → (N, k) of all of them, one after the other."""
        widths = [part.meta["val"].shape[-1] for part in parts] if width is None else [width] * len(parts)
        rows = [
            self.call(_aten.reshape.default, part, [-1, int(size)])
            for part, size in zip(parts, widths, strict=True)
        ]
        return rows[0] if len(rows) == 1 else self.call(_aten.cat.default, rows, 1)

    def tokens(self, view: View) -> fx.Node:
        """(g, s, m), in any order → (N, m)."""
        ordered = self._ordered(view, ["m"])
        if len(self._lead) == 1:
            return ordered
        return self.call(_aten.reshape.default, ordered, [-1, int(self._labels.sizes["m"])])

    def _after(self, value: fx.Node | None, step: Step, indices: fx.Node) -> fx.Node | None:
        if step.what == "then":
            return None if value is None else self._cast(self._applied(step.view.node, value))
        factor = self._cast(self._at(step.view, indices))
        if step.what == "divided by":
            value = value or self.call(_aten.ones_like.default, factor)
            return self.call(_aten.div.Tensor, value, factor)
        return factor if value is None else self.call(_aten.mul.Tensor, value, factor)

    def _applied(self, operator: fx.Node, value: fx.Node) -> fx.Node:
        if operator.meta["val"].dtype is torch.bool and len(arguments(operator)) < 2:
            return self.call(_aten.ne.Scalar, value, 0)
        return self.call(operator.target, value, *arguments(operator)[1:])  # type: ignore[arg-type]

    def _cast(self, node: fx.Node) -> fx.Node:
        if node.meta["val"].dtype is self.dtype:
            return node
        return self.call(_aten._to_copy.default, node, dtype=self.dtype)

    def _at(self, view: View, indices: fx.Node) -> fx.Node:
        """(g, s, k), with sizes of 1: a value at the chosen experts."""
        if "e" not in view.labels:
            return self._ordered(view, ["k"])
        missing = [label for label in self._lead if label not in view.labels]
        if missing == self._lead and "k" not in view.labels:
            return self.call(_aten.index.Tensor, self._moved(view, ["e"])[0], [indices])
        if missing:
            raise NotSparseError(f"{named(view.node)} has some axes of the tokens, not all")
        if "k" not in view.labels:
            return self.call(_aten.gather.default, self._ordered(view, ["e"]), -1, indices)
        places = self.call(_aten.unsqueeze.default, indices, -1)
        found = self.call(_aten.gather.default, self._ordered(view, ["k", "e"]), -1, places)
        return self.call(_aten.squeeze.dim, found, -1)

    def _ordered(self, view: View, last: list[str]) -> fx.Node:
        """A value with the axes of the tokens first, then others, each of size 1 where it has none."""
        wanted = [*self._lead, *last]
        node, labels = self._moved(view, wanted)
        for place, label in enumerate(wanted):
            if label not in labels:
                node = self.call(_aten.unsqueeze.default, node, place)
        return node

    def _moved(self, view: View, wanted: list[str]) -> tuple[fx.Node, list[str]]:
        """A value with one axis a label, in the order of those that are wanted."""
        node, axes = self._split(view)
        labels = [axis[0] for axis in axes]
        if not set(labels) <= set(wanted):
            raise NotSparseError(f"{named(view.node)} has axes that the block has not")
        order = [labels.index(label) for label in wanted if label in labels]
        if order != sorted(order):
            node = self.call(_aten.permute.default, node, order)
        return node, [labels[place] for place in order]

    def _split(self, view: View) -> tuple[fx.Node, list[Axis]]:
        """Without axes of size 1 or of one place, and with one axis a label."""
        if any(len(axis) > 1 for axis in view.axes):
            view = self._labels.peeled(view, values=True)
        node, axes = view.node, list(view.axes)
        for place in reversed(range(len(axes))):
            axis = axes[place]
            if axis == () or axis[0].startswith(FIXED):
                index = int(axis[0].removeprefix(FIXED)) if axis else 0
                node = self.call(_aten.select.int, node, place, index)
                del axes[place]
        if any(len(axis) > 1 for axis in axes):
            known = [self._labels.sizes[label] for axis in axes for label in axis]
            numbers = [fixed(size) for size in known]
            sizes = [-1 if number is None else number for number in numbers]
            if sizes.count(-1) > 1:
                raise NotSparseError(f"{named(view.node)} has an axis of which several sizes are free")
            node = self.call(_aten.reshape.default, node, sizes)
            axes = [(label,) for axis in axes for label in axis]
        return node, axes
