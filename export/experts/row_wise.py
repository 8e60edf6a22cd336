"""Operators that compute each row by itself, elementwise, along its axes or as a product: rules of `experts/rows`.

A product with the expert's own matrix becomes one plain product of all R rows with it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from moe_export.export.axes.letters import Letters, letters_of
from moe_export.export.axes.operators import NORMS
from moe_export.export.axes.shapes import (
    arguments,
    named_axes,
    named_axis,
    order_of,
    rank_of,
    rest_of,
    shape_of,
)
from moe_export.export.experts.rows import Make, PairBody, Region, Rows
from moe_export.export.sizes import same_shape, same_size

_aten = torch.ops.aten

Rule = Callable[[Region, fx.Node], "Rows | None"]


def same(region: Region, node: fx.Node) -> Rows | None:
    """Copies, casts and the like: the same operator on the rows, whose integers keep their meaning."""
    source = arguments(node)[0]
    assert isinstance(source, fx.Node)
    rows = region.rows[source]

    def make(body: PairBody) -> fx.Node:
        return body.call(node.target, body.value(source), *arguments(node)[1:], **node.kwargs)

    return Rows(*rows.where, make, rows.number, rows.constant, rows.weighs)


def pointwise(region: Region, node: fx.Node) -> Rows | None:
    """An elementwise operator: operands are aligned from the right."""
    rank = rank_of(node)
    rows = region.common(node.all_input_nodes, rank)
    own = [source for source in node.all_input_nodes if source in region.rows]
    if rows is None or any(rank_of(source) != rank for source in own) or _sizes_outside(node):
        return None

    def make(body: PairBody) -> fx.Node:
        args = fx.map_arg(arguments(node), lambda arg: body.operand(arg, rows, rank))
        kwargs = fx.map_arg(node.kwargs, lambda arg: body.operand(arg, rows, rank))
        return body.call(node.target, *args, **kwargs)

    return Rows(*rows.where, make, "", rows.constant, rows.weighs)


def along(region: Region, node: fx.Node) -> Rows | None:
    """An operator along the axes that it names; none of them runs over pairs."""
    source = arguments(node)[0]
    sources = list(source) if isinstance(source, (list, tuple)) else [source]
    rank = rank_of(sources[0])
    rows, axes = region.common(sources, rank), named_axes(node)
    if rows is None or not axes or min(axes) < rows.lead:
        return None
    if any(rank_of(each) != rank for each in sources) or _sizes_outside(node):
        return None

    def make(body: PairBody) -> fx.Node:
        mine = [_expanded(body, region, each, rows, rank, alone=len(sources) == 1) for each in sources]
        first = mine if isinstance(source, (list, tuple)) else mine[0]
        return body.call(node.target, first, *arguments(node)[1:], **node.kwargs)

    number = region.rows[source].number if node.target in _AXES_OF_ONE else ""
    return Rows(*rows.where, make, number, rows.constant, rows.weighs)


_AXES_OF_ONE = {_aten.unsqueeze.default, _aten.squeeze.dim}


def of_slot(region: Region, node: fx.Node) -> Rows | None:
    """`grid[:, j]`, the pairs of one slot; of a grid of one slot, by `squeeze(1)` too, all of them."""
    source, _, *place = arguments(node)
    rows = region.rows[source]
    if rows.where != (2, None) or named_axes(node) != (1,) or not (place or region.slots == 1):
        return along(region, node)

    def make(body: PairBody) -> fx.Node:
        return body.call(_aten.squeeze.dim, body.value(source), 1)

    slot = place[0] % region.slots if region.slots > 1 else None
    return dataclasses.replace(rows, lead=1, order=slot, make=make)


def _expanded(
    body: PairBody, region: Region, node: fx.Node, rows: Rows, rank: int, *, alone: bool
) -> fx.Node:
    """An operand, expanded to all R rows if other operands have them."""
    made: fx.Node = body.operand(node, rows, rank)
    if alone or (node in region.rows and (rows.constant or not region.rows[node].constant)):
        return made
    count = body.call(_aten.sym_size.int, body.token, 0)
    return body.call(_aten.expand.default, made, [count, *([-1] * (rank - 1))])


def _sizes_outside(node: fx.Node) -> bool:
    """Whether an operator takes a computed size, or a float of sizes: a block takes tensors."""
    return any(
        isinstance(source.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))
        for source in node.all_input_nodes
    )


def split(region: Region, node: fx.Node) -> Rows | None:
    """`split` into equal parts, written with the sizes of the parts."""
    rows = along(region, node)
    if rows is None:
        return None
    axis = named_axis(node)
    sizes = [int(part.shape[axis]) for part in node.meta["val"]]

    def make(body: PairBody) -> fx.Node:
        return body.call(_aten.split_with_sizes.default, body.value(arguments(node)[0]), sizes, axis)

    return dataclasses.replace(rows, make=make)


def part(region: Region, node: fx.Node) -> Rows | None:
    source, index = arguments(node)
    assert isinstance(source, fx.Node)
    rows = region.rows[source]
    if rows.number == "sort":
        order = rows.order
        assert order is not None
        if index == 0:
            return Rows(1, order, lambda body: body.expert, "expert", constant=True)
        return Rows(1, order, lambda body: body.pair(), "pair")

    def make(body: PairBody) -> fx.Node:
        return body.call(operator.getitem, body.value(source), index)

    return Rows(*rows.where, make, "", rows.constant, rows.weighs)


def reshaped(region: Region, node: fx.Node) -> Rows | None:
    """`view` within a row, or between a grid and the flat pairs."""
    source = arguments(node)[0]
    assert isinstance(source, fx.Node)
    rows = region.rows[source]
    if rows.lead == 0:
        return None
    grids = rank_of(node) > 1 and region.leads(shape_of(node), 2)
    stays = (
        rows.lead == 1
        and same_shape(shape_of(node)[1:2], shape_of(source)[1:2])
        and not _regroups(region, node, source)
    )
    if rows.order is None and grids and not (region.slots == 1 and stays):
        lead = 2
    elif rank_of(node) > 0 and region.leads(shape_of(node), 1, rows.order):
        lead = 1
    else:
        return None
    rest = rest_of(node, lead)
    if rest is None:
        return None

    def make(body: PairBody) -> fx.Node:
        begin = [1] * lead if rows.constant else [-1] + [1] * (lead - 1)
        return body.call(_aten.reshape.default, body.value(source), [*begin, *rest])

    return Rows(lead, rows.order, make, rows.number if set(rest) <= {1} else "", rows.constant, rows.weighs)


def _regroups(region: Region, node: fx.Node, source: fx.Node) -> bool:
    """Whether (S, H) becomes (N, k, H)."""
    return rank_of(node) == rank_of(source) + 1 and same_size(shape_of(node)[1], region.slots)


def expand(region: Region, node: fx.Node) -> Rows | None:
    source = arguments(node)[0]
    assert isinstance(source, fx.Node)
    rows = region.rows[source]
    rest = rest_of(node, rows.lead)
    if rest is None or rank_of(source) != rank_of(node) or rows.lead == 0:
        return None
    if not same_shape(shape_of(node)[: rows.lead], shape_of(source)[: rows.lead]):
        return None

    def make(body: PairBody) -> fx.Node:
        return body.call(_aten.expand.default, body.value(source), [*([-1] * rows.lead), *rest])

    return Rows(*rows.where, make, rows.number, rows.constant, rows.weighs)


def repeat(region: Region, node: fx.Node) -> Rows | None:
    source, times = arguments(node)
    assert isinstance(source, fx.Node)
    rows = region.rows[source]
    if rows.lead == 0 or len(times) != rank_of(source) or any(each != 1 for each in times[: rows.lead]):
        return None
    return same(region, node)


def turned(region: Region, node: fx.Node) -> Rows | None:
    """Axes in another order, those of the pairs first, as they were."""
    lead = region.rows[arguments(node)[0]].lead
    return same(region, node) if order_of(node)[:lead] == list(range(lead)) else None


def beside_shared(region: Region, node: fx.Node) -> Rows | None:
    """An operator on the last axes of rows, with weights that all experts share: a linear map, a norm."""
    source, *others = arguments(node)
    if node.target is _aten.addmm.default:
        source, others = others[0], [source, *others[1:]]
    rows, width = region.rows.get(source), len(others[0]) if node.target in NORMS else 1
    if rows is None or rows.lead == 0 or rank_of(source) - width < rows.lead:
        return None
    shared = [each for each in others if isinstance(each, fx.Node)]
    if any(
        each in region.rows or rank_of(each) > max(2, width) or _has_pairs(region, each) for each in shared
    ):
        return None

    def make(body: PairBody) -> fx.Node:
        args = fx.map_arg(arguments(node), lambda arg: body.value(arg) if arg is source else body.share(arg))
        return body.call(node.target, *args, **node.kwargs)

    return Rows(*rows.where, make, "", rows.constant, rows.weighs)


def _has_pairs(region: Region, node: fx.Node) -> bool:
    """Whether a bias has a row for each pair."""
    return any(same_size(size, region.pairs) for size in shape_of(node)[:-1])


def matmul(region: Region, node: fx.Node) -> Rows | None:
    """Matrices of every pair: (S, m, a) times (S, a, b), or both in a grid."""
    first, second = arguments(node)
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    rows = region.common([first, second], rank_of(first))
    if rows is None or rank_of(first) != rank_of(second) or rank_of(first) != rows.lead + 2:
        return beside_shared(region, node) if second not in region.rows and first in region.rows else None

    def make(body: PairBody) -> fx.Node:
        left, right = (body.operand(each, rows, rows.lead + 2) for each in (first, second))
        fixed = [each in region.rows and region.rows[each].constant for each in (first, second)]
        return multiply(body, left, right, fixed, rows.lead, (shape_of(first)[-2], shape_of(second)[-1]))

    return Rows(*rows.where, make, "", rows.constant, rows.weighs)


def multiply(
    body: PairBody,
    left: fx.Node,
    right: fx.Node,
    fixed: Sequence[bool],
    lead: int,
    outer: tuple[object, object],
) -> fx.Node:
    """Matrices of rows times matrices of rows, either of which may be the expert's own one: one plain product."""
    if fixed[1] and not fixed[0]:
        matrix = body.bare(right, lead)
        if not same_size(outer[0], 1):
            return body.call(_aten.matmul.default, left, matrix)
        flat = body.call(_aten.matmul.default, body.call(_aten.squeeze.dim, left, -2), matrix)
        return body.call(_aten.unsqueeze.default, flat, -2)
    if fixed[0] and not fixed[1]:
        matrix = body.bare(left, lead)
        if same_size(outer[1], 1):
            flat = body.call(_aten.linear.default, body.call(_aten.squeeze.dim, right, -1), matrix)
            return body.call(_aten.unsqueeze.default, flat, -1)
        turned = body.call(_aten.linear.default, body.call(_aten.transpose.int, right, -2, -1), matrix)
        return body.call(_aten.transpose.int, turned, -2, -1)
    return body.call(_aten.matmul.default, left, right)


def einsum(region: Region, node: fx.Node) -> Rows | None:
    """Row by row where the result keeps the letters of the pairs."""
    found = einsum_over_pairs(region, node)
    if found is None or not found.read.out.startswith(found.begin):
        return None
    return Rows(*found.rows.where, found.make(found.read.out), "", found.rows.constant, found.rows.weighs)


@dataclass(frozen=True)
class EinsumOverPairs:
    """An einsum over pairs.

    Attributes:
        read: Its letters.
        rows: What its rows run over.
        begin: The letters for that: of all pairs, or of tokens and slots.
    """

    read: Letters
    rows: Rows
    begin: str

    def make(self, out: str) -> Make:
        """Writes the einsum of R rows, with these letters for the result."""
        return lambda body: _write_einsum(body, self, out)


def einsum_over_pairs(region: Region, node: fx.Node) -> EinsumOverPairs | None:
    """An einsum read as one over pairs.

    None if an operand's letters of pairs do not come first and in order, as they do in the values.
    """
    read = letters_of(node)
    terms, operands, rows = read.terms, read.operands, region.common(read.operands)
    if rows is None:
        return None
    begins = {
        term[: rows.lead] for term, operand in zip(terms, operands, strict=True) if operand in region.rows
    }
    if len(begins) != 1:
        return None
    (begin,) = begins
    for term, operand in zip(terms, operands, strict=True):
        own = "".join(letter for letter in term if letter in begin)
        if own not in ("", begin, begin[0], begin[1:]) or not term.startswith(own):
            return None
        if 0 < len(own) < len(begin) and same_size(shape_of(operand)[0], 1):  # one for all tokens, or slots
            return None
    ends = [term for term, operand in zip(terms, operands, strict=True) if operand not in region.rows]
    if any(letter in begin for term in ends for letter in term):
        rows = dataclasses.replace(rows, constant=False)
    return EinsumOverPairs(read, rows, begin)


def _write_einsum(body: PairBody, found: EinsumOverPairs, out: str) -> fx.Node:
    """The einsum of R rows: an operand that is the same for all of them loses the letters that run over pairs."""
    begin, rows = found.begin, found.rows
    mine, letters = [], []
    for term, operand in zip(found.read.terms, found.read.operands, strict=True):
        known = body.region.rows.get(operand)
        behind = "".join(letter for letter in term if letter not in begin)
        if known is not None and known.constant:
            mine.append(body.bare(body.value(operand), rows.lead))
            letters.append(behind)
        elif known is not None:
            mine.append(body.value(operand))
            letters.append(term)
        else:
            mine.append(_einsum_leaf(body, rows, begin, term, operand))
            letters.append(begin + behind if len(term) > len(behind) else behind)
    return body.call(_aten.einsum.default, f"{','.join(letters)}->{out}", mine)


def _einsum_leaf(body: PairBody, rows: Rows, begin: str, term: str, operand: fx.Node) -> fx.Node:
    own = [letter for letter in term if letter in begin]
    if not own:
        return body.share(operand)
    if rows.lead == 2 and own == [begin[0]]:  # (N, ...): by token alone
        return body.call(
            _aten.unsqueeze.default, body.call(_aten.index.Tensor, body.share(operand), [body.token]), 1
        )
    return body.leaf(operand, rows, len(term) + rows.lead - len(own))
