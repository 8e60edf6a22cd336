"""A loop over experts inside code that lays out all pairs as rows: its body becomes part of the whole block's body."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.operators import ZEROS
from moe_export.export.axes.shapes import arguments, rank_of
from moe_export.export.experts.body import Experts
from moe_export.export.experts.notes import named
from moe_export.export.experts.rows import PairBody, Region, Rows

_aten = torch.ops.aten


def inlined(region: Region, loop: Experts, *, adds: bool) -> Rows | None:
    """What the result of a loop runs over, if the loop runs over the pairs of this region as rows; else None.

    Args:
        region: What is known of the values before it.
        loop: A loop that was understood by itself: its "tokens" are pairs, with one expert each.
        adds: Whether it adds its rows to other rows.
    """
    rows = region.rows.get(loop.indices)
    if rows is None or rows.number != "expert" or rows.lead != 1 or loop.indices is region.indices:
        return None
    if isinstance(rows.order, int):  # `slot_loops` has put those of all slots together, if they are alike
        return None
    if not adds and loop.start is not None and loop.start.target not in ZEROS:
        return None

    def make(body: PairBody) -> fx.Node:
        return _write(body, rows, loop)

    return Rows(1, rows.order, make, weighs=True)


def _write(body: PairBody, rows: Rows, loop: Experts) -> fx.Node:
    """Write the loop's body; where it reads a value by its own row number, it gets the value of that pair."""
    inputs = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    token, _, expert, *rest = inputs
    shared = dict(zip(rest, loop.shared, strict=False))
    copies: dict[fx.Node, fx.Node] = {expert: body.expert}
    for place, weight in zip(rest[len(loop.shared) :], loop.weights, strict=True):
        copies[place] = body.weight(weight)

    def copied(node: fx.Node) -> fx.Node:
        if node in copies:
            return copies[node]
        if node in shared:
            return body.share(shared[node])
        if node is token and rows.order is None:
            return body.pair()
        raise RefusedError("the experts compute with the numbers of sorted rows")

    for node in loop.body.graph.nodes:
        if node.op != "call_function":
            continue
        source, table = _read_by(node, token, shared), _read_by_pair(node, body, copies, shared)
        if source is not None:
            copies[node] = _row(body, rows, source)
        elif table is not None:
            copies[node] = body.flat(table)
        else:
            copies[node] = body.graph.node_copy(node, copied)
    (result,) = next(node for node in loop.body.graph.nodes if node.op == "output").args
    return copies[result]


def _read_by(node: fx.Node, token: fx.Node, shared: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The outside value that a node reads by row numbers; None if it does not."""
    source: Any = arguments(node)[0] if arguments(node) else None
    by_index = node.target is _aten.index.Tensor and list(arguments(node)[1]) == [token]
    by_select = node.target is _aten.index_select.default and arguments(node)[1:3] == (0, token)
    return shared.get(source) if by_index or by_select else None


def _read_by_pair(
    node: fx.Node, body: PairBody, copies: dict[fx.Node, fx.Node], shared: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    """The outside value (S, ...) that a node reads by the flat numbers of the pairs; None if it does not."""
    if node.target is not _aten.index.Tensor or len(arguments(node)[1]) != 1:
        return None
    source, (index,) = arguments(node)
    table = shared.get(source)
    if table is None or table in body.region.rows or not body.is_pair(copies.get(index)):
        return None
    return table


def _row(body: PairBody, rows: Rows, source: fx.Node) -> fx.Node:
    known = body.region.rows.get(source)
    if known is None:
        return body.leaf(source, rows, rank_of(source))
    if known.where != rows.where:
        raise RefusedError(f"{named(source)} is not sorted by expert as the other values are")
    made = body.value(source)
    if not known.constant:
        return made
    count = body.call(_aten.sym_size.int, body.token, 0)
    return body.call(_aten.expand.default, made, [count, *([-1] * (rank_of(source) - 1))])
