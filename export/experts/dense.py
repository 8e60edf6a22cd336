"""Dense dispatch: MoE blocks in which every expert computes every token, and weights of 0 drop what was not chosen.

    einsum("ned,ne->nd", experts(x), gates)    (rows * gates.t()[..., None]).sum(0)    out + gates[:, e:e+1] * expert(x)

The gates are 0 for experts that were not chosen (`axes/support`), or a mask `indices == e` is, so the sum is over the
chosen ones:

    out[n] = sum over e of body(n, e) = sum over the slots s of body(n, idx[n, s])

if the body is 0 where its gate is. That is checked on random numbers (`experts/trial`): an expert with a bias
after its weighted input is not 0 there, and stays as it was written.

Letters: N tokens, k slots, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.analysis import meanings_of
from moe_export.export.axes.choice import as_choice
from moe_export.export.axes.chosen import name_once
from moe_export.export.axes.extents import leaves
from moe_export.export.axes.one_hot import one_hot_mask_of
from moe_export.export.axes.operators import ZEROS
from moe_export.export.axes.shapes import rank_of
from moe_export.export.axes.support import support_of, supports_in
from moe_export.export.experts.body import Experts
from moe_export.export.experts.canonical import value_numbering
from moe_export.export.experts.combine import added_up
from moe_export.export.experts.derived import entries_at
from moe_export.export.experts.one_expert import OneExpert, Scope
from moe_export.export.experts.trial import check
from moe_export.export.frontend.source import line_of

_aten = torch.ops.aten
_ADDS_UP = {
    _aten.sum.dim_IntList, _aten.einsum.default, _aten.matmul.default, _aten.bmm.default, _aten.mm.default,
}  # fmt: skip


def find_dense(
    graph: fx.Graph, taken: Sequence[Experts], within: Collection[fx.Node], noted: Collection[str | None]
) -> Iterator[Experts]:
    """Every block in which all experts compute all tokens.

    Args:
        graph: The traced program.
        taken: Blocks that were found by other means.
        within: Values of these blocks.
        noted: Lines of masks with a capacity of which it was said why they are no block.
    """
    choices = [choice for choice in map(as_choice, graph.nodes) if choice is not None]
    says_which = choices and (supports_in(graph) or any(map(one_hot_mask_of, graph.nodes)))
    sums = [node for node in graph.nodes if node.target in _ADDS_UP] if says_which else []
    counts = {choice.experts for choice in choices}
    chains = [(node, chain) for node in graph.nodes for count in counts if (chain := added_up(node, count))]
    if not sums and not chains:
        return
    known, value_numbers = meanings_of(graph), value_numbering(graph)
    scopes = {
        choice: Scope(known, tokens, experts, choice.experts, value_numbers)
        for choice in choices
        for *lead, experts in [known.axes(choice.scores)]
        for tokens in [tuple(leaves(lead))]
        if tokens and experts
    }
    found: list[tuple[fx.Node, Scope, Sequence[fx.Node], Any]] = [
        (node, scope, [node], None)
        for node in sums
        for scope in scopes.values()
        if not scope.of_experts(node) and any(map(scope.of_experts, node.all_input_nodes))
    ]
    for node, (parts, start) in chains:
        before = [choice for choice in scopes if choice.experts == len(parts) and choice.operator < node]
        found += [(node, scopes[choice], parts, start) for choice in before[-1:]]
    ends = {end for block in taken for end in (block.result, *block.result.all_input_nodes)} | {*within}
    for result, scope, results, start in found:
        with suppress(RefusedError):  # it is no sum of what the chosen experts give
            known_already = result in ends or line_of(result.meta.get("stack_trace")) in noted
            block = None if known_already else _block(result, results, start, scope)
            if block is not None:
                ends.add(result)
                yield block


def _block(
    result: fx.Node, results: Sequence[fx.Node], start: fx.Node | None, scope: Scope
) -> Experts | None:
    one = OneExpert(results, scope)
    tables = [node for node in one.outside if scope.is_table(node) and support_of(node) is not None]
    decides = next(iter([*tables, *one.marks]), None)
    if decides is None or not one.weights:
        return None
    chosen = support_of(decides) if decides in tables else decides
    if chosen is None or not name_once(chosen):
        return None
    slots = rank_of(chosen) == 2
    gates = {node: entries_at(node, chosen) for node in tables if slots and support_of(node) is chosen}
    check(one, gates, decides)
    return Experts(
        indices=chosen,
        count=scope.count,
        body=one.module(gates),
        shared=tuple(gates.get(node, node) for node in one.outside),
        weights=one.weights,
        start=None if start is not None and start.target in ZEROS else start,
        result=result,
        line=line_of(result.meta.get("stack_trace")),
    )
