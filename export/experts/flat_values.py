"""Values that follow from a choice of experts, with one axis of tokens, and how they are written, for `flat_tokens`.

Letters: b, t axes of tokens, k slots, R rows that were picked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.one_hot import index_axes
from moe_export.export.axes.operators import ZEROS
from moe_export.export.axes.shapes import rank_of, shape_of
from moe_export.export.sizes import fixed, same_shape, same_size

_aten = torch.ops.aten


class Flattening:
    """The values that follow from one choice.

    Attributes:
        graph: The graph that is rewritten.
        indices: The choice, (b, t, k).
        axes: How many axes tokens have.
        lead: The sizes of these axes.
        flat: Node whose first axes are those of tokens → the same value with one axis of tokens.
        places: Indices along one axis of tokens, from a mask → indices along the flat axis, and which axis it was.
        masks: The list of all indices of a mask's true entries → that of the same mask over flat tokens.
        done: Nodes that a rule has rewritten.
    """

    def __init__(self, graph: fx.Graph, indices: fx.Node) -> None:
        self.graph, self.indices = graph, indices
        self.axes = index_axes(indices).count("token")
        self.lead = shape_of(indices)[: self.axes]
        self._before, self.done = set(graph.nodes), set[fx.Node]()
        self.flat = {indices: self._reshaped(indices, indices.next)}
        self.places: dict[fx.Node, tuple[fx.Node, int]] = {}
        self._beside: dict[fx.Node, fx.Node] = {}
        self.masks: dict[fx.Node, fx.Node] = {}

    def follows(self, node: fx.Node) -> bool:
        """Whether a node reads a value that follows from the choice."""
        return any(
            source in self.flat or source in self.places or source in self.masks
            for source in node.all_input_nodes
        )

    def hand_back(self, node: fx.Node, flat: fx.Node) -> None:
        """Give nodes that no rule has rewritten the value with its original axes."""
        others = [user for user in node.users if user in self._before and user not in self.done]
        if not others:
            return
        with self.graph.inserting_before(flat.next):
            shape = [self._size(self.indices, axis) for axis in range(self.axes)]
            shape += [self._size(flat, axis) for axis in range(1, rank_of(flat))]
            back = self.graph.call_function(_aten.reshape.default, (flat, shape))
        back.meta = dict(node.meta)
        for user in others:
            user.replace_input_with(node, back)

    def known(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> bool:
        """Write a value that has tokens, now along one axis; always True, as the result of a rule."""
        made = self._call(node, target, args, kwargs)
        made.meta = _flat_meta(node, self.axes)
        self.flat[node] = made
        return True

    def same(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> bool:
        """Write a value that has no axes of tokens from flat operands; always True, as the result of a rule."""
        made = self._call(node, target, args, kwargs)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        return True

    def leads(self, node: fx.Node) -> bool:
        """Whether a value begins with the axes of tokens."""
        return same_shape(shape_of(node)[: self.axes], self.lead)

    def rows(self, node: fx.Node, before: fx.Node) -> fx.Node | None:
        """A value that begins with the axes of tokens, flat; None if it does not."""
        if node in self.flat:
            return self.flat[node]
        if not self.leads(node):
            return None
        if node not in self._beside:
            made = self._reshaped(node, before)
            if node.target in ZEROS:  # it has to stay recognisable as zeros
                with self.graph.inserting_before(before):
                    zeros = self.graph.call_function(_aten.zeros_like.default, (made,))
                zeros.meta, made = dict(made.meta), zeros
            self._beside[node] = made
        return self._beside[node]

    def expanded(self, node: fx.Node, before: fx.Node, rank: int) -> fx.Node | None:
        """An operand of an operator that broadcasts, for flat tokens; None if it cannot be aligned.

        Args:
            node: The operand.
            before: The node that new nodes are written in front of.
            rank: How many axes the operator's result has.
        """
        lined = self.axes - (rank - rank_of(node))  # how many of its axes are aligned with those of tokens
        if node in self.flat:
            return self.flat[node] if lined == self.axes else None
        if lined <= 0:
            return node
        if all(same_size(size, 1) for size in shape_of(node)[:lined]):
            return self._reshaped(node, before, first=1, axes=lined)
        if lined == self.axes and self.leads(node):
            return self.rows(node, before)
        with self.graph.inserting_before(before):
            lead = [self._size(self.indices, axis) for axis in range(self.axes)]
            wide = self.graph.call_function(_aten.expand.default, (node, [*lead, *[-1] * (rank - self.axes)]))
        shape = [*self.indices.meta["val"].shape[: self.axes], *node.meta["val"].shape[lined:]]
        wide.meta = {**node.meta, "val": node.meta["val"].new_empty(shape)}
        return self._reshaped(wide, before)

    def picks(self, indices: Sequence[Any]) -> tuple[Sequence[Any], int] | None:
        """Indices that pick tokens by a mask, or by the indices of its true entries, for flat tokens.

        Returns:
            The new indices, and how many axes the old ones index. None for any other indices.
        """
        first = indices[0]
        if len(indices) == 1 and first in self.flat and first.meta["val"].dtype is torch.bool:
            return [self.flat[first]], rank_of(first)
        found = [self.places.get(index) for index in indices[: self.axes] if isinstance(index, fx.Node)]
        if len(found) < self.axes or None in found or len({each[0] for each in found if each}) > 1:
            return None
        if [each[1] for each in found if each] != list(range(self.axes)) or found[0] is None:
            return None
        return [found[0][0], *indices[self.axes :]], len(indices)

    def _call(self, node: fx.Node, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Node:
        with self.graph.inserting_before(node):
            return self.graph.call_function(target, tuple(args), dict(kwargs))

    def _reshaped(self, node: fx.Node, before: fx.Node, first: int = -1, axes: int | None = None) -> fx.Node:
        """A value whose first axes are merged into one."""
        axes = self.axes if axes is None else axes
        with self.graph.inserting_before(before):
            rest = [self._size(node, axis) for axis in range(axes, rank_of(node))]
            made = self.graph.call_function(_aten.reshape.default, (node, [first, *rest]))
        made.meta = _flat_meta(node, axes)
        return made

    def _size(self, node: fx.Node, axis: int) -> Any:
        """A size as a number, or as a node that is written at the graph's insertion point."""
        size = node.meta["val"].shape[axis]
        number = fixed(size)
        if number is not None:
            return number
        made = self.graph.call_function(_aten.sym_size.int, (node, axis))
        made.meta["val"] = size
        return made


def _flat_meta(node: fx.Node, axes: int) -> dict[str, Any]:
    """The metadata of a value whose first axes are merged into one."""
    value = node.meta["val"]
    shape = [math.prod(value.shape[:axes]), *value.shape[axes:]]
    return {**node.meta, "val": value.new_empty(shape)}
