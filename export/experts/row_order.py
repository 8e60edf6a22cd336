"""Lookups, sorting and counting in code that computes all pairs at once: rules of `experts/rows`.

Sorting the pairs by expert, reading rows in that order and putting them back moves rows without changing any; counts
and running counts say where each expert's rows are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.chosen import names_experts
from moe_export.export.axes.one_hot import one_hot_mask_of
from moe_export.export.axes.shapes import argument, arguments, is_numbering, named_axes, rank_of, shape_of
from moe_export.export.experts.row_wise import along, pointwise
from moe_export.export.experts.rows import PairBody, Region, Rows
from moe_export.export.sizes import same_shape, same_size

_aten = torch.ops.aten


def index(region: Region, node: fx.Node) -> Rows | None:
    """`table[integers]`, read by integers of the pairs."""
    source, indices = arguments(node)
    if not isinstance(source, fx.Node) or not isinstance(indices, (list, tuple)):
        return None
    return _looked_up(region, source, list(indices))


def index_select(region: Region, node: fx.Node) -> Rows | None:
    source, axis, index = arguments(node)
    if axis != 0 or not isinstance(source, fx.Node) or not isinstance(index, fx.Node):
        return None
    return _looked_up(region, source, [index])


def embedding(region: Region, node: fx.Node) -> Rows | None:
    table, index = arguments(node)[:2]
    if not isinstance(table, fx.Node) or not isinstance(index, fx.Node):
        return None
    return _looked_up(region, table, [index])


def _looked_up(region: Region, source: fx.Node, indices: list[Any]) -> Rows | None:
    if any(not isinstance(index, fx.Node) for index in indices):
        return None
    rows = region.common(indices)
    if rows is None or any(rank_of(index) != rows.lead for index in indices):
        return None
    first = region.rows.get(indices[0])
    if source in region.rows:
        return _moved(region, region.rows[source], source, first) if len(indices) == 1 and first else None
    if len(indices) == 1 and first is not None and first.number == "expert":
        size = shape_of(source)[0]
        if not same_size(size, region.count):
            raise RefusedError(
                f"{source.name} holds the weights of {size} experts, and {region.count} are used"
            )
        lead = rows.lead
        return Rows(
            *rows.where,
            lambda body: body.as_rows(body.stack(source), lead),
            constant=True,
            weighs=rank_of(source) > 1,
        )

    numbers = [region.rows[each].number if each in region.rows else "" for each in indices]
    if numbers == ["pair"] and is_token_of_each_pair(source, region.slots):
        return Rows(*rows.where, lambda body: body.token, "token")

    def make(body: PairBody) -> fx.Node:
        if numbers == ["pair"]:
            return body.flat(source)
        if numbers == ["token", "expert"] and rows.lead == 1:
            return body.entry(source)
        found = [body.operand(index, rows, rows.lead) for index in indices]
        return body.call(_aten.index.Tensor, body.share(source), found)

    return Rows(*rows.where, make, "", weighs=rows.weighs)


def is_token_of_each_pair(node: fx.Node, slots: int) -> bool:
    """Whether a value (S,) is 0, ..., 0, 1, ..., 1, ...: each number of a token as often as it has slots."""
    if node.target is not _aten.repeat_interleave.self_int:
        return False
    numbers, repeats, *axis = arguments(node)
    return (
        isinstance(numbers, fx.Node)
        and is_numbering(numbers)
        and repeats == slots
        and axis in ([], [None], [0])
    )


def gather(region: Region, node: fx.Node) -> Rows | None:
    """`rows.gather(1, expert)`: the entry of each pair's own expert in rows (S, E)."""
    source, axis, index = arguments(node)[:3]
    rows = region.common([source, index], rank_of(source))
    if rows is None or source not in region.rows or index not in region.rows:
        return None
    if rank_of(source) != rank_of(index) or min(named_axes(node)) < rows.lead:
        return None
    table = _table_of(region, source)
    if table is not None and region.rows[index].number == "expert" and rank_of(index) == 2:
        return Rows(*rows.where, lambda body: body.call(_aten.unsqueeze.default, body.entry(table), 1))

    def make(body: PairBody) -> fx.Node:
        count = body.call(_aten.sym_size.int, body.token, 0)
        wanted = [-1] * (rank_of(index) - 1)
        mine = [
            body.call(_aten.expand.default, body.value(each), [count, *wanted])
            if region.rows[each].constant
            else body.value(each)
            for each in (source, index)
        ]
        return body.call(node.target, mine[0], axis, mine[1])

    return Rows(*rows.where, make, "", constant=rows.constant, weighs=rows.weighs)


def _table_of(region: Region, node: fx.Node) -> fx.Node | None:
    """The `table` of `table[token]`, (N, E)."""
    if node.target is not _aten.index.Tensor or len(arguments(node)[1]) != 1:
        return None
    table, (index,) = arguments(node)
    known = region.rows.get(index)
    by_token = known is not None and known.number == "token" and rank_of(index) == 1
    fits = table not in region.rows and rank_of(table) == 2 and same_size(shape_of(table)[1], region.count)
    return table if by_token and fits else None


def _moved(region: Region, rows: Rows, source: fx.Node, index: Rows | None) -> Rows | None:
    """Rows read in another order: sorted, or back in the order of the pairs."""
    if index is None or rows.lead != 1 or index.lead != 1:
        return None
    sorts = index.number == "pair" and rows.order is None
    unsorts = index.number == "place" and index.order is None and rows.order is not None
    if unsorts and index.unsorts is not rows.order:
        return None
    if not sorts and not unsorts:
        return None
    return Rows(1, index.order, lambda body: body.value(source), rows.number, rows.constant, rows.weighs)


def sort(region: Region, node: fx.Node) -> Rows | None:
    """Sorting the pairs' experts gives an order; sorting an order gives each pair's place in it."""
    source = arguments(node)[0]
    assert isinstance(source, fx.Node)
    rows = region.rows[source]
    if rows.lead != 1 or rank_of(source) != 1 or descends(node):
        return None
    whole = node.target in (_aten.sort.default, _aten.sort.stable)
    if rows.number == "expert" and rows.order is None:
        if whole:
            return Rows(1, node, lambda body: body.token, "sort")
        return Rows(1, node, lambda body: body.pair(), "pair")
    if rows.number == "pair" and isinstance(rows.order, fx.Node) and not whole:
        return Rows(1, None, lambda body: body.token, "place", unsorts=rows.order)
    return None


def descends(node: fx.Node) -> bool:
    """Whether a sort puts the largest first."""
    flags = [arg for arg in arguments(node)[1:] if isinstance(arg, bool)]
    stable = node.target in (_aten.sort.stable, _aten.argsort.stable)
    return bool(node.kwargs.get("descending", False)) or (
        any(flags[1:]) if stable and len(flags) > 1 else any(flags)
    )


def counted_from_behind(region: Region, node: fx.Node) -> Rows | None:
    """`where(e < 0, e + E, e)` of experts that a gate chose: none of them is below 0."""
    is_below, _, chosen = arguments(node)
    rows = region.rows.get(chosen)
    compares = isinstance(is_below, fx.Node) and is_below.target is _aten.lt.Scalar
    if rows is None or rows.number != "expert" or not compares or arguments(is_below) != (chosen, 0):
        return pointwise(region, node)
    if not names_experts(region.indices, region.count):
        return pointwise(region, node)
    return dataclasses.replace(rows, make=lambda body: body.value(chosen))


def divided(region: Region, node: fx.Node) -> Rows | None:
    """The flat number of a pair, divided by k: its token."""
    source, by = arguments(node)[:2]
    rows = region.rows.get(source)
    whole = node.target is _aten.floor_divide.default or node.kwargs.get("rounding_mode") in (
        "floor",
        "trunc",
    )
    if rows is not None and rows.number == "pair" and by == region.slots and whole:
        return Rows(*rows.where, lambda body: body.token, "token")
    return pointwise(region, node)


def remainder(region: Region, node: fx.Node) -> Rows | None:
    source, by = arguments(node)[:2]
    rows = region.rows.get(source)
    if rows is not None and rows.number == "pair" and by == region.slots:
        return Rows(*rows.where, lambda body: body.slot, "slot")
    return pointwise(region, node)


def put(region: Region, node: fx.Node) -> Rows | None:
    """Sorted rows put where their pairs belong, all of them: back in the order of the pairs."""
    if node.target is _aten.index_put.default:
        base, (index, *more), values = arguments(node)[0], arguments(node)[1], arguments(node)[2]
        if more or argument(node, 3, "accumulate", False):
            return None
    else:
        base, axis, index, values = arguments(node)[:4]
        if axis != 0 or rank_of(index) != 1:
            return None
    order = region.rows.get(index)
    if (
        order is None
        or order.number != "pair"
        or not isinstance(order.order, fx.Node)
        or not same_shape(shape_of(base)[:1], shape_of(index)[:1])
    ):
        return None
    assert isinstance(values, fx.Node)
    if values in region.rows:
        rows = region.rows[values]
        if rows.where != order.where or rank_of(values) != rank_of(node):
            return None
        return Rows(1, None, lambda body: body.value(values), rows.number, rows.constant, rows.weighs)
    if is_numbering(values) and same_size(shape_of(values)[0], region.pairs):
        return Rows(1, None, lambda body: body.token, "place", unsorts=order.order)
    return None


def counts(region: Region, node: fx.Node) -> Rows | None:
    """How many pairs each expert has: `histc` and `bincount` of the experts."""
    source = arguments(node)[0]
    assert isinstance(source, fx.Node)
    rows = region.rows[source]
    of_all = not isinstance(rows.order, int)
    if rows.number != "expert" or not of_all or not same_shape(shape_of(node), [region.count]):
        return None
    if node.target is _aten.histc.default and list(arguments(node)[2:4]) != [0, region.count - 1]:
        return None
    return Rows(0, None, lambda body: body.expert, "counts")


def one_hot(region: Region, node: fx.Node) -> Rows | None:
    """`one_hot` of the experts: (N, k, E) or (S, E)."""
    source = arguments(node)[0]
    assert isinstance(source, fx.Node)
    rows = region.rows[source]
    if rows.number != "expert" or not same_size(shape_of(node)[-1], region.count):
        return None

    def make(body: PairBody) -> fx.Node:
        return body.call(_aten.one_hot.default, body.value(source), region.count)

    return Rows(*rows.where, make, "one-hot", rows.constant)


def running(region: Region, node: fx.Node) -> Rows | None:
    """The running sum of the counts: where each expert's rows end."""
    source = arguments(node)[0]
    assert isinstance(source, fx.Node)
    if region.rows[source].number == "counts":
        return Rows(0, None, lambda body: body.expert, "ends")
    return along(region, node)


def counted(region: Region, node: fx.Node) -> Rows | None:
    """The sum of the pairs' one-hot masks over all pairs, or of the tokens' over all tokens."""
    rows = region.rows[arguments(node)[0]]
    over_all = {"one-hot": [*range(rows.lead)], "token one-hot": [0]}.get(rows.number)
    if sorted(named_axes(node)) != over_all or isinstance(rows.order, int) or rank_of(node) != 1:
        return None
    return Rows(0, None, lambda body: body.expert, "counts")


def token_one_hot(region: Region, node: fx.Node) -> Rows | None:
    """`zeros(N, E).scatter(1, idx, 1)`: which experts each token chose."""
    one_hot = one_hot_mask_of(node)
    chosen = region.rows.get(one_hot.indices) if one_hot is not None else None
    if chosen is None or chosen.number != "expert" or chosen.where != (2, None):
        return None
    if not same_size(shape_of(node)[-1], region.count):
        return None
    return Rows(0, None, lambda body: body.expert, "token one-hot")


def behind(region: Region, node: fx.Node) -> Rows | None:
    """`row >= ends` for the numbers of all rows (S, 1): whether a row comes after those of an expert, (S, E)."""
    numbers, ends = arguments(node)
    known = region.rows.get(ends)
    if known is None or known.number != "ends" or numbers in region.rows:
        return pointwise(region, node)
    if numbers.target is not _aten.unsqueeze.default or not is_numbering(arguments(numbers)[0]):
        return None
    if not same_shape(shape_of(node), [region.pairs, region.count]):
        return None
    return Rows(0, None, lambda body: body.expert, "behind")


def segment(region: Region, node: fx.Node) -> Rows | None:
    """How many experts end before each row: the expert of the row, if rows are sorted by expert.

    All orders by expert have the same experts in the same rows, so it belongs to the region's order, if there is one.
    """
    if region.rows[arguments(node)[0]].number != "behind" or named_axes(node) != (1,):
        return None
    orders = {rows.order for rows in region.rows.values() if isinstance(rows.order, fx.Node)}
    if len(orders) != 1:
        return None
    return Rows(1, orders.pop(), lambda body: body.expert, "expert", constant=True)
