"""Which value on the way from a choice to its experts lost its meaning: the first that no rule follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.choice import as_choice, is_part
from moe_export.export.axes.extents import leaves
from moe_export.export.axes.listing import Listing, listing_of
from moe_export.export.axes.meaning import Meanings
from moe_export.export.axes.one_hot import one_hot_mask_of
from moe_export.export.axes.support import support_of, supports_in
from moe_export.export.experts.find import row_numbers
from moe_export.export.experts.listed import region_of
from moe_export.export.experts.notes import named
from moe_export.export.experts.pairs import Loop, follow, has_slots, region_from
from moe_export.export.experts.rows import Region
from moe_export.export.frontend.source import line_of
from moe_export.export.gates.region import is_size
from moe_export.export.tracing.weight_inputs import is_weight

_aten = torch.ops.aten
_NO_VALUES = {_aten._assert_tensor_metadata.default, _aten._assert_scalar.default}


@dataclass(frozen=True)
class Way:
    """The values from some choices to where rows of experts come together.

    Attributes:
        nodes: The values.
        meanings: What their axes run over.
    """

    nodes: frozenset[fx.Node]
    meanings: Meanings

    @classmethod
    def back_from(cls, ends: Sequence[fx.Node], meanings: Meanings) -> Way:
        """What some values follow from, back to the choices that their row numbers come from."""
        stack, seen = list(ends), set(ends)
        while stack:
            node = stack.pop()
            if as_choice(node) is None and not is_weight(node):
                new = [each for each in node.all_input_nodes if each not in seen]
                seen.update(new)
                stack += new
        return cls(frozenset(seen), meanings)

    @property
    def choices(self) -> set[fx.Node]:
        """The operators that choose."""
        return {node for node in self.nodes if as_choice(node) is not None}

    @cached_property
    def lines(self) -> set[str | None]:
        """The lines of what follows from the last choice: an earlier one is that of an earlier block."""
        last = max(self.choices, default=None)
        own = {last} if last is not None else set(self.nodes)
        for node in sorted(self.nodes):
            if not own.isdisjoint(node.all_input_nodes):
                own.add(node)
        return {line_of(node.meta.get("stack_trace")) for node in own if node is not None} - {None}

    def why(self, loops: Mapping[fx.Node, Loop]) -> str:
        """Why no block came of it, in words.

        Args:
            loops: Loops over experts that were understood by themselves.
        """
        known = self.known(loops)
        for node in sorted(self.nodes - known):
            has_value = node.target not in _NO_VALUES and not is_size(node) and not is_part(node)
            lost = not known.isdisjoint(node.all_input_nodes) and known.isdisjoint(node.users)
            if has_value and lost:
                return f"it is not known of which tokens and experts the result of {named(node)} is"
        return "its rows are not added up over the choices of a token"

    def known(self, loops: Mapping[fx.Node, Loop]) -> set[fx.Node]:
        """The values that still say something about tokens and experts, by following each choice and each list."""
        known = supports_in(next(iter(self.nodes)).graph).keys() & self.nodes
        for node in self.nodes:
            if node.op != "call_function":
                continue
            choice, listing = as_choice(node), listing_of(node)
            one_hot = one_hot_mask_of(node)
            if one_hot is not None or self._is_of_experts(node):
                known.add(node)
            if one_hot is not None and one_hot.expert is not None:
                numbers = [each for each in row_numbers(node, one_hot) if each is not None]
                known |= {*numbers, *(each.all_input_nodes[0] for each in numbers)}
            if choice is not None and choice.indices in self.nodes and has_slots(choice.indices):
                known |= _followed(region_from(choice.indices, choice.experts), loops)
            elif listing is not None and _is_of_choice(listing):
                known |= _followed(region_of(node, listing), loops)
        return known

    def _is_of_experts(self, node: fx.Node) -> bool:
        """Whether a value is about tokens and experts, or the experts' slots, or comes from a running count."""
        found = self.meanings.of(node)
        if found is None or node in self.meanings.lost:
            return False
        roles = {extent.role for extent in leaves(self.meanings.axes(node))}
        return found.running or "capacity slot" in roles or {"token", "expert"} <= roles


def _followed(region: Region, loops: Mapping[fx.Node, Loop]) -> set[fx.Node]:
    with suppress(RefusedError):  # what was followed up to there is known
        follow(region, loops)
    return set(region.rows)


def _is_of_choice(listing: Listing) -> bool:
    """Whether a list is of chosen pairs, rather than of any entries of a mask."""
    return listing.entries is None or support_of(listing.entries.matrix) is not None
