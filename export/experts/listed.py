"""Find MoE blocks that list their pairs: `nonzero` of gates (N, E), sorted by expert or not.

    nonzero(gates) ─▶ sort by expert ─▶ x[token] ─▶ split by counts ─▶ experts ─▶ cat ─▶ * gates ─▶ index_add

A list has S pairs, which only the data knows; the block has the pairs of all N tokens and their k choices, of which
those that the list leaves out, because their entry is 0, have the index -1. The choices are those that the gates were
made from, if they are seen to be 0 elsewhere (`axes/support`); otherwise all E experts.

Letters: N tokens, k slots, E experts, S listed pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.listing import Listing, counted_entries, entries_of, listing_of
from moe_export.export.axes.shapes import arguments, shape_of
from moe_export.export.experts.derived import indices_of_entries
from moe_export.export.experts.notes import named
from moe_export.export.experts.pairs import Found, Loop, block_in
from moe_export.export.experts.row_columns import side_by_side
from moe_export.export.experts.rows import PairBody, Region, Rows
from moe_export.export.frontend.source import line_of
from moe_export.export.sizes import Size, fixed, same_shape

_aten = torch.ops.aten


@dataclass(frozen=True)
class ListedRegion(Region):
    """Values that follow from a list of pairs: rows (S, ...) in the order of the list, or sorted by expert.

    Attributes:
        size: S.
        gates: (N, E), whose entries are listed; None where it is a one-hot mask (N, k, E).
        weights: (N, k), the entries of `gates` for the choices; None likewise.
    """

    size: Size = 0
    gates: fx.Node | None = None
    weights: fx.Node | None = None

    @property
    def slots(self) -> int:
        """0: no row of a list is found by a token and a slot."""
        return 0

    @property
    def pairs(self) -> Size:
        return self.size

    def leads(self, shape: tuple[object, ...], lead: int) -> bool:  # type: ignore[override]
        return lead == 1 and super().leads(shape, lead)


class _ListedBody(PairBody):
    """A body that knows no pair's place in the list."""

    region: ListedRegion

    def pair(self) -> fx.Node:
        raise RefusedError("the experts compute with the place of a pair in a list")

    def flat(self, node: fx.Node) -> fx.Node:
        raise RefusedError(f"{named(node)} has a row for each pair, and it is not known of which")

    def entry(self, table: fx.Node) -> fx.Node:
        if table is self.region.gates and self.region.weights is not None:
            return self.call(_aten.index.Tensor, self.share(self.region.weights), [self.token, self.slot])
        return super().entry(table)


def find_listed(
    graph: fx.Graph, loops: Mapping[fx.Node, Loop], refused: list[tuple[str | None, str]]
) -> Iterator[Found]:
    """Every block that lists its pairs.

    Args:
        graph: The traced program; the choices of the listed pairs are written into it.
        loops: Loops over experts that were understood, by the node that each ends in.
        refused: Gets the line of each block that stays as it was written, and why.
    """
    listings: list[tuple[fx.Node, Listing]] = []
    for node in list(graph.nodes):
        listing = listing_of(node)
        if listing is None or any(listing.agrees(known) for _, known in listings):
            continue
        listings.append((node, listing))
        where = line_of(node.meta.get("stack_trace"))
        try:
            found = block_in(region_of(node, listing), loops, line=where, body=_ListedBody)
        except RefusedError as error:
            refused.append((where, str(error)))
            continue
        if found is not None:
            yield found


def region_of(node: fx.Node, listing: Listing) -> ListedRegion:
    """What is known where pairs are listed: the lists of the same pairs, their counts, what is read by their mask."""
    order = node if listing.axes[0] == "expert" else None
    numbers: dict[str, Rows] = {
        "token": Rows(1, order, lambda body: body.token, "token"),
        "slot": Rows(1, order, lambda body: body.slot, "slot"),
        "expert": Rows(1, order, lambda body: body.expert, "expert", constant=True),
    }
    columns = tuple(numbers[axis] for axis in listing.axes)
    region = _of_entries(node, listing) if listing.entries is not None else _of_one_hot(node, listing)
    for other in node.graph.nodes:
        again = listing_of(other)
        if again is not None and again.agrees(listing):
            region.rows[other] = numbers[again.column] if again.column else side_by_side(columns, order)
            continue
        if listing.entries is None:
            continue
        counted = counted_entries(other)
        if counted is not None and counted.agrees(listing.entries):
            region.rows[other] = Rows(0, None, lambda body: body.expert, "counts")
        table = _read_by_mask(other, listing)
        if table is not None:
            region.rows[other] = _entries(region, table, order)
    return region


def _size_of(node: fx.Node) -> Size:
    value = node.meta["val"]
    size: Size = (value if isinstance(value, torch.Tensor) else value[0]).shape[0]
    return size


def _of_one_hot(node: fx.Node, listing: Listing) -> ListedRegion:
    one_hot = listing.one_hot
    assert one_hot is not None
    mask = arguments(node)[0]
    experts = fixed(shape_of(mask)[one_hot.axes.index("expert")])
    if experts is None:
        raise RefusedError("the number of experts is not fixed")
    return ListedRegion(one_hot.indices, experts, {}, size=_size_of(node))


def _of_entries(node: fx.Node, listing: Listing) -> ListedRegion:
    entries = listing.entries
    assert entries is not None
    indices, weights = indices_of_entries(entries)
    return ListedRegion(
        indices, entries.experts, {}, size=_size_of(node), gates=entries.matrix, weights=weights
    )


def _read_by_mask(node: fx.Node, listing: Listing) -> fx.Node | None:
    """The `table` (N, E, ...) of `table[mask]`, or `masked_select`, which reads the listed entries in their order."""
    turned = listing.axes[0] == "expert"
    if node.target is _aten.index.Tensor and len(arguments(node)[1]) == 1 and not turned:
        table, (mask,) = arguments(node)
    elif node.target is _aten.masked_select.default:
        source, mask = arguments(node)
        values = entries_of(source)  # the same values, perhaps turned
        same = values is not None and values.turned is turned and same_shape(shape_of(source), shape_of(mask))
        if values is None or not same or values.matrix.meta["val"].dtype != source.meta["val"].dtype:
            return None
        table = values.matrix
    else:
        return None
    entries = entries_of(mask) if mask.meta["val"].dtype is torch.bool else None
    if entries is None or listing.entries is None or entries.turned is not turned:
        return None
    return table if entries.agrees(listing.entries) else None


def _entries(region: ListedRegion, table: fx.Node, order: fx.Node | None) -> Rows:
    return Rows(1, order, lambda body: body.entry(table))
