"""Where the rows of a token's k slots are added up: the end of an MoE block that computes all pairs at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.operators import ZEROS
from moe_export.export.axes.shapes import argument, arguments, named_axes, rank_of, shape_of
from moe_export.export.experts.canonical import text_of
from moe_export.export.experts.row_wise import einsum_over_pairs
from moe_export.export.experts.rows import Make, PairBody, Region, Rows
from moe_export.export.sizes import same_shape, same_size

_aten = torch.ops.aten


@dataclass(frozen=True)
class Combination:
    """The end of a block.

    Attributes:
        result: (N, ...), the node of the sums.
        start: What the rows are added to; None for nothing.
        make: Writes the rows (R, ...) that are added up.
    """

    result: fx.Node
    start: fx.Node | None
    make: Make


def combination(region: Region, node: fx.Node) -> Combination | None:
    """The combination in a node, if that adds up the experts' rows over the slots of each token; else None."""
    if node.target is _aten.sum.dim_IntList:
        return _sum(region, node)
    if node.target is _aten.einsum.default:
        return _einsum(region, node)
    if node.target in (_aten.bmm.default, _aten.matmul.default):
        return _product(region, node)
    if node.target in _SCATTERS:
        return _scatter(region, node)
    if node.target is _aten.add.Tensor:
        return _slot_by_slot(region, node)
    return None


def _is_grid(rows: Rows | None) -> bool:
    return rows is not None and rows.where == (2, None) and rows.weighs and not rows.constant


def _sum(region: Region, node: fx.Node) -> Combination | None:
    source = arguments(node)[0]
    keeps = argument(node, 2, "keepdim", False)
    if not _is_grid(region.rows.get(source)) or keeps or named_axes(node) != (1,):
        return None

    def make(body: PairBody) -> fx.Node:
        rows = body.call(_aten.squeeze.dim, body.value(source), 1)
        cast = node.kwargs.get("dtype")
        return rows if cast is None else body.call(_aten._to_copy.default, rows, dtype=cast)

    return Combination(node, None, make)


def _einsum(region: Region, node: fx.Node) -> Combination | None:
    """`nk,nkh->nh`: the letter of the slots is summed away."""
    found = einsum_over_pairs(region, node)
    if found is None or not _is_grid(found.rows):
        return None
    begin, out = found.begin, found.read.out
    if begin[1] in out or not out.startswith(begin[0]):
        return None
    make = found.make(begin + out[1:])
    return Combination(node, None, lambda body: body.call(_aten.squeeze.dim, make(body), 1))


def _product(region: Region, node: fx.Node) -> Combination | None:
    """Weights (N, 1, k) times rows (N, k, H) → (N, 1, H)."""
    weights, source = arguments(node)
    if not isinstance(source, fx.Node) or not isinstance(weights, fx.Node) or weights in region.rows:
        return None
    if not _is_grid(region.rows.get(source)) or rank_of(source) != 3:
        return None
    if not same_shape(shape_of(weights), [region.tokens, 1, region.slots]):
        return None

    def make(body: PairBody) -> fx.Node:
        mine = body.call(_aten.squeeze.dim, body.share(weights), 1)
        mine = body.call(_aten.index.Tensor, mine, [body.token, body.slot])
        mine = body.call(_aten.reshape.default, mine, [-1, 1, 1])
        return body.call(_aten.mul.Tensor, mine, body.value(source))

    return Combination(node, None, make)


_SCATTERS = {
    _aten.index_add.default, _aten.index_put.default, _aten.scatter_add.default, _aten.scatter_reduce.two,
}  # fmt: skip


def _scatter(region: Region, node: fx.Node) -> Combination | None:
    """Rows added to the rows of their tokens."""
    args = arguments(node)
    if node.target is _aten.index_put.default:
        start, index, source = args[0], args[1][0], args[2]
        adds = argument(node, 3, "accumulate", False)
        if not adds or len(args[1]) != 1:
            return None
    else:
        start, axis, index, source = args[:4]
        if axis != 0 or argument(node, 4, "reduce", "sum") != "sum" or node.kwargs:
            return None
    tokens, rows = region.rows.get(index), region.rows.get(source)
    if tokens is None or rows is None or tokens.number != "token" or tokens.where != rows.where:
        return None
    if not rows.weighs or rows.lead != 1 or not same_size(shape_of(start)[0], region.tokens):
        return None
    if rank_of(index) > 1 and not same_shape(shape_of(index), shape_of(source)):
        return None
    assert isinstance(source, fx.Node)
    return Combination(node, start, lambda body: body.value(source))


def _slot_by_slot(region: Region, node: fx.Node) -> Combination | None:
    """The rows of each slot, added one after the other: every slot has to compute the same."""
    found = added_up(node, region.slots)
    if found is None:
        return None
    parts, start = found
    rows = [region.rows.get(part) for part in parts]
    if {each.order for each in rows if each is not None and each.weighs} != set(range(region.slots)):
        return None
    if start in region.rows and region.rows[start].weighs:
        return None
    written = [_written(region, part) for part in parts]
    if any(other != written[0] for other in written[1:]):
        return None
    start = None if start is not None and start.target in ZEROS else start
    return Combination(node, start, lambda body: body.value(parts[0]))


def _written(region: Region, value: fx.Node) -> tuple[object, ...]:
    """The body of a value, and what it reads."""
    body = PairBody(region)
    module = body.module(body.value(value))
    return text_of(module), list(body.shared), list(body.weights)


def added_up(node: fx.Node, count: int) -> tuple[list[fx.Node], fx.Node | None] | None:
    """So many parts that are added one after the other, the last in this node, and what they are added to."""
    parts: list[fx.Node] = []
    rest: Any = node
    for _ in range(count):
        while parts and isinstance(rest, fx.Node) and rest.target is _aten.clone.default:
            rest = arguments(rest)[0]  # what `out[n] += ...` writes back
        if not isinstance(rest, fx.Node) or rest.target is not _aten.add.Tensor or rest.kwargs:
            break
        rest, part = arguments(rest)
        if not isinstance(part, fx.Node):  # 0 + ..., with which `sum` begins
            rest, part = part, rest
        if not isinstance(part, fx.Node) or (parts and part.target is not parts[0].target):
            return None
        parts.insert(0, part)
    if len(parts) == count - 1 and isinstance(rest, fx.Node) and parts and rest.target is parts[0].target:
        return [rest, *parts], None
    start = rest if isinstance(rest, fx.Node) else None
    fits = start is None or same_shape(shape_of(start), shape_of(node))
    return (parts, start) if len(parts) == count > 1 and fits else None
