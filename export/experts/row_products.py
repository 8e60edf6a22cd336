"""Matrix products in code that computes all pairs at once: rules of `experts/rows`.

A product with the expert's own matrix becomes one plain product of all R rows with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from moe_export.export.axes.shapes import arguments, rank_of, shape_of
from moe_export.export.experts.row_shapes import beside_shared
from moe_export.export.experts.rows import PairBody, Region, Rows
from moe_export.export.sizes import same_size

_aten = torch.ops.aten


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
    equation, operands = arguments(node)[:2]
    split = einsum_letters(region, str(equation), list(operands))
    if split is None:
        return None
    rows, begin, terms, out = split
    if not out.startswith(begin):
        return None

    def make(body: PairBody) -> fx.Node:
        return write_einsum(body, rows, begin, terms, out, list(operands))

    return Rows(*rows.where, make, "", rows.constant, rows.weighs)


def einsum_letters(
    region: Region, equation: str, operands: list[fx.Node]
) -> tuple[Rows, str, list[str], str] | None:
    """The letters of an einsum over pairs: what its rows run over, the letters for that, each operand's, the result's.

    None if an operand's letters of pairs do not come first and in order, as they do in the values.
    """
    rows = region.common(operands)
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if rows is None or not arrow or "." in equation or len(terms) != len(operands):
        return None
    begins = {
        term[: rows.lead] for term, operand in zip(terms, operands, strict=True) if operand in region.rows
    }
    if len(begins) != 1:
        return None
    (begin,) = begins
    for term in terms:
        own = "".join(letter for letter in term if letter in begin)
        if own not in ("", begin, begin[0], begin[1:]) or not term.startswith(own):
            return None
    ends = [term for term, operand in zip(terms, operands, strict=True) if operand not in region.rows]
    if any(letter in begin for term in ends for letter in term):
        rows = dataclasses.replace(rows, constant=False)
    return rows, begin, terms, out


def write_einsum(
    body: PairBody, rows: Rows, begin: str, terms: list[str], out: str, operands: list[fx.Node]
) -> fx.Node:
    """The einsum of R rows: an operand that is the same for all of them loses the letters that run over pairs."""
    mine, letters = [], []
    for term, operand in zip(terms, operands, strict=True):
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
