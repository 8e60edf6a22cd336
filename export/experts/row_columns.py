"""Numbers of pairs side by side, (S, 2), as `nonzero` lists them, taken apart again: rules of `experts/rows`."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.operators import CASTS, TURNS
from moe_export.export.axes.shapes import argument, arguments, named_axes, rank_of
from moe_export.export.experts.row_order import descends
from moe_export.export.experts.rows import Number, PairBody, Region, Rows

_aten = torch.ops.aten


def side_by_side(
    columns: tuple[Rows | None, ...], order: fx.Node | int | None, number: Number = "columns"
) -> Rows:
    """Several numbers of each pair as one value."""
    return Rows(1, order, _whole, number, columns=columns)


def _whole(body: PairBody) -> fx.Node:
    raise RefusedError("the experts compute with a list of pairs as a whole")


def columns_after(region: Region, node: fx.Node) -> Rows | None:
    """What an operator takes of numbers that are side by side; None if that is not known."""
    rows = region.rows[arguments(node)[0]]
    if node.target in CASTS:
        return rows
    if node.target is operator.getitem:
        return _part(rows, *arguments(node))
    if node.target in TURNS and rows.number == "columns":
        return dataclasses.replace(rows, number="turned columns")
    if node.target in (_aten.select.int, _aten.unbind.int):
        return _taken(rows, node)
    rule = _RULES.get(node.target) if rows.number == "columns" else None
    return rule(region, rows, node) if rule is not None else None


def _taken(rows: Rows, node: fx.Node) -> Rows | None:
    """One column, or all as a tuple."""
    if named_axes(node) != ({"columns": 1, "turned columns": 0}.get(rows.number),):
        return None
    if node.target is _aten.select.int:
        column: Rows | None = rows.columns[arguments(node)[2]]
        return column
    return dataclasses.replace(rows, number="columns")


def _sorted(region: Region, rows: Rows, node: fx.Node) -> Rows | None:
    return (
        dataclasses.replace(rows, number="sorts") if named_axes(node) == (0,) and not descends(node) else None
    )


def _split(region: Region, rows: Rows, node: fx.Node) -> Rows | None:
    alone = arguments(node)[1] == 1 and named_axes(node) == (1,)
    return dataclasses.replace(rows, number="parts") if alone else None


def _part(rows: Rows, source: fx.Node, place: int) -> Rows | None:
    """One part of a tuple."""
    if rows.number == "columns":
        return rows.columns[place]
    if rows.number == "parts":
        column = rows.columns[place]
        return _upright(column) if column is not None else None
    if rows.number != "sorts" or rows.order is not None:
        return None
    # Each column is sorted by itself, so only that of the experts still says something about pairs.
    sorted_ones = {
        0: Rows(1, source, lambda body: body.expert, "expert", constant=True),
        1: Rows(1, source, lambda body: body.pair(), "pair"),
    }
    by_expert = tuple(
        sorted_ones[place] if column is not None and column.number == "expert" else None
        for column in rows.columns
    )
    return side_by_side(by_expert, source)


def _upright(rows: Rows) -> Rows:
    """A column (S, 1)."""

    def make(body: PairBody) -> fx.Node:
        return body.call(_aten.unsqueeze.default, rows.make(body), 1)

    return dataclasses.replace(rows, make=make)


def _sliced(region: Region, rows: Rows, node: fx.Node) -> Rows | None:
    if named_axes(node) != (1,):
        return None
    columns = rows.columns[argument(node, 2, "start") : argument(node, 3, "end")]
    if len(columns) != 1:
        return dataclasses.replace(rows, columns=columns)
    return _upright(columns[0]) if columns[0] is not None else None


def _in_order(region: Region, rows: Rows, node: fx.Node) -> Rows | None:
    """The list, read in an order of its pairs."""
    args = arguments(node)
    index = args[1] if node.target is _aten.index.Tensor else [args[2]][: 1 - args[1]]
    order = region.rows.get(index[0]) if len(index) == 1 else None
    if order is None or order.number != "pair" or rank_of(index[0]) != 1 or rows.order is not None:
        return None
    columns = (
        dataclasses.replace(column, order=order.order) if column is not None else None
        for column in rows.columns
    )
    return side_by_side(tuple(columns), order.order)


_RULES: Mapping[Any, Callable[[Region, Rows, fx.Node], Rows | None]] = {
    _aten.sort.default: _sorted,
    _aten.sort.stable: _sorted,
    _aten.split.Tensor: _split,
    _aten.slice.Tensor: _sliced,
    _aten.index.Tensor: _in_order,
    _aten.index_select.default: _in_order,
}
