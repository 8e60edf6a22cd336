"""Results of all experts, of which those of the chosen ones are picked: rules of `experts/rows`.

    outs = torch.stack([expert(x) for expert in experts], 1)                    (N, E, H)
    outs.gather(1, idx[..., None].expand(-1, -1, H))                            (N, k, H)
    outs[torch.arange(N)[:, None], idx]     torch.take_along_dim(outs, idx[..., None], 1)     one_hot(idx) @ outs

A pick gives each pair what its expert computes of its token. So the row of a pair is that of one expert, cut out of the
code that computes all of them (`experts/one_expert`) and proved by running it (`experts/trial`).

Letters: N tokens, k slots, E experts, R rows of a body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.analysis import meanings_of
from moe_export.export.axes.letters import products
from moe_export.export.axes.operators import CASTS, VIEWS
from moe_export.export.axes.shapes import arguments, is_numbering, rank_of, shape_of
from moe_export.export.experts.body import Weight
from moe_export.export.experts.canonical import value_numbering
from moe_export.export.experts.one_expert import OneExpert, Scope
from moe_export.export.experts.row_order import is_token_of_each_pair
from moe_export.export.experts.rows import PairBody, Region, Rows
from moe_export.export.experts.trial import check
from moe_export.export.sizes import fixed, same_shape, same_size

_aten = torch.ops.aten

_RANK = 3  # results (N, E, H); what is picked from a table (N, E) are weights
_MATRIX = 2  # an expert has one at least; a vector for each place on an axis may be anything
_KEEP_NUMBERS = {*CASTS, *VIEWS, _aten.unsqueeze.default, _aten.expand.default}


@dataclass(frozen=True)
class _Pick:
    """An operator that takes some of all results.

    Attributes:
        node: The operator.
        results: What all experts give for all tokens.
        axes: The axis of the tokens of these results, and that of the experts.
        numbers: Which experts are chosen: integers, or their one-hot mask.
        tokens: Which tokens, where these are picked by integers, too.
        stays: Whether the axis of the experts is that of the slots now, even for one slot.
    """

    node: fx.Node
    results: fx.Node
    axes: tuple[int, int]
    numbers: fx.Node
    tokens: fx.Node | None = None
    stays: bool = False


@dataclass(frozen=True)
class Picked:
    """An operator that takes the results of chosen experts.

    Attributes:
        count: E.
        numbers: Which experts are chosen: integers, or their one-hot mask.
    """

    count: int
    numbers: fx.Node
    _pick: _Pick
    _body: fx.GraphModule
    _shared: tuple[fx.Node, ...]
    _weights: tuple[Weight, ...]

    def rows(self, region: Region) -> Rows | None:
        """What the picked results run over; None if they are picked by anything but the experts of each pair."""
        pick, chosen = self._pick, region.rows.get(self.numbers)
        if chosen is None or chosen.number not in ("expert", "one-hot") or self.count != region.count:
            return None
        tokens = shape_of(pick.results)[pick.axes[0]]
        if not same_size(tokens, region.tokens) or not _are_own_tokens(region, pick, chosen):
            return None
        if pick.stays and chosen.lead == 1 and not same_size(shape_of(pick.node)[1], 1):
            return None
        return Rows(*chosen.where, lambda body: self._write(body, chosen.lead), weighs=True)

    def _write(self, body: PairBody, lead: int) -> fx.Node:
        """The rows: (R, 1, ...) for a grid, or where the axis of the experts stays; else (R, ...)."""
        token, slot, expert, *rest = self._body.graph.find_nodes(op="placeholder")
        copies = {token: body.token, slot: body.slot, expert: body.expert}
        own = [*map(body.share, self._shared), *map(body.weight, self._weights)]
        copies |= dict(zip(rest, own, strict=True))
        value = body.graph.graph_copy(self._body.graph, copies)
        assert isinstance(value, fx.Node)
        return value if lead == 2 or self._pick.stays else body.call(_aten.squeeze.dim, value, 1)


def find_picked(graph: fx.Graph) -> Mapping[fx.Node, Picked]:
    """Every operator that picks some of the results that all experts give for all tokens."""
    picks = [pick for node in graph.nodes for pick in _picks(node) if rank_of(pick.results) >= _RANK]
    if not picks:
        return {}
    known, value_numbers = meanings_of(graph), value_numbering(graph)
    found: dict[fx.Node, Picked] = {}
    for pick in picks:
        axes = known.axes(pick.results)
        tokens, experts = (axes[place] if axes else () for place in pick.axes)
        count = fixed(shape_of(pick.results)[pick.axes[1]])
        if pick.node in found or not tokens or not experts or count is None:
            continue
        with suppress(RefusedError):  # the results are of no experts
            one = OneExpert([pick.results], Scope(known, tokens, experts, count, value_numbers))
            if any(map(_is_matrix, one.weights)):
                check(one, {})
                found[pick.node] = Picked(count, pick.numbers, pick, one.module({}), one.outside, one.weights)
    return found


def _is_matrix(weight: Weight) -> bool:
    if weight.stack is not None:
        return rank_of(weight.stack) > _MATRIX
    return rank_of(weight.separate[0]) >= _MATRIX


def _picks(node: fx.Node) -> Iterator[_Pick]:
    """A node as an operator that picks along an axis, in each way to read it."""
    args = arguments(node)
    if node.target is _aten.gather.default:
        results, axis, numbers = args[:3]
        yield from _along(node, results, axis, numbers)
    elif node.target is _aten.index.Tensor and len(args[1]) == 2 and None not in args[1]:
        results, (one, other) = args
        yield _Pick(node, results, (0, 1), other, one)
        yield _Pick(node, results, (1, 0), one, other)
    else:
        for product in products(node):
            summed, tokens = product.shared(kept=False), product.shared(kept=True)
            mask, own = product.terms
            slots = product.only(0)
            if len(summed) == len(tokens) == 1 and [*mask] == [*tokens, *slots, *summed]:
                rest = [letter for letter in own if letter not in (*tokens, *summed)]
                if [*product.out] == [*tokens, *slots, *rest] and _is_whole(product.operands[0]):
                    axes = (own.index(tokens[0]), own.index(summed[0]))
                    yield _Pick(node, product.operands[1], axes, product.operands[0])


def _along(node: fx.Node, results: fx.Node, axis: int, numbers: fx.Node) -> Iterator[_Pick]:
    """A pick along the second axis of results (N, E, ...): the other axes are those of the results."""
    tokens, _, *rest = (*shape_of(results), 0, 0)[: max(2, rank_of(results))]
    whole = [tokens, *shape_of(numbers)[1:2], *rest]
    if axis % max(1, rank_of(results)) == 1 and same_shape(shape_of(numbers), whole):
        yield _Pick(node, results, (0, 1), numbers, stays=True)


def _are_own_tokens(region: Region, pick: _Pick, chosen: Rows) -> bool:
    """Whether each pair's expert is picked for the pair's own token."""
    tokens, by_slot = pick.tokens, chosen.lead == 2 or region.slots == 1 or isinstance(chosen.order, int)
    in_order = chosen.order is None or isinstance(chosen.order, int)
    if tokens is None:  # the results, and what picks of them, are lined up
        return in_order and by_slot
    if rank_of(pick.numbers) != chosen.lead:
        return False
    known = region.rows.get(tokens)
    if known is not None:
        return known.number == "token" and known.where == chosen.where and rank_of(tokens) == chosen.lead
    ones = [1] * (chosen.lead - 1)
    while tokens.target is _aten.expand.default:
        tokens = arguments(tokens)[0]
    if not in_order:
        return False
    if not by_slot:
        return is_token_of_each_pair(tokens, region.slots)
    if not same_shape(shape_of(tokens), [region.tokens, *ones]):
        return False
    tokens = _before_casts(tokens)
    return is_numbering(tokens) and same_size(shape_of(tokens)[0], region.tokens)


def _is_whole(mask: fx.Node) -> bool:
    """Whether a factor of a product holds whole numbers, as a mask does: any product of rows looks like a pick."""
    value = _before_casts(mask).meta.get("val")
    return isinstance(value, torch.Tensor) and not value.dtype.is_floating_point


def _before_casts(node: fx.Node) -> fx.Node:
    """A value whose entries are the same numbers, in another type or shape."""
    while node.target in _KEEP_NUMBERS:
        node = arguments(node)[0]
    return node
