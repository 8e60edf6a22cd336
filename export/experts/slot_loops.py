"""Loops over slots and experts, in either order: `for j in range(k): for e in ...: out[idx[:, j] == e] += ...`.

```
iterations ─▶ those of one slot, idx[:, j] ─▶ `understand` ─▶ one block a slot, all alike ─▶ one block, indices (N, k)
```
Each slot's iterations are a loop over experts with indices (N,). They are one block if the slots use the same weights
and compute the same; what they read for themselves, `w[:, j]`, becomes a value (N, k, ...) of which a pair reads its
own.

Letters: N tokens, k slots, E experts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.shapes import arguments, rank_of, shape_of
from moe_export.export.experts.body import Experts, GraphIndex, understand
from moe_export.export.experts.canonical import text_of
from moe_export.export.experts.derived import derived
from moe_export.export.experts.find import Chain, Iteration
from moe_export.export.frontend.source import line_of
from moe_export.export.sizes import same_size

_aten = torch.ops.aten
_ROWS = 3  # of a body's arguments: token, slot, expert


def understand_loops(chain: Chain, graph_index: GraphIndex) -> list[tuple[Chain, Experts]]:
    """Find out what a chain computes; see `understand`.

    Returns:
        One block, and its iterations; one after the other where slots that follow each other are not alike.

    Raises:
        RefusedError: The experts, or the slots, differ in more than they may; says why.
    """
    slots: dict[fx.Node, list[Iteration]] = {}
    for iteration in chain.iterations:
        slots.setdefault(graph_index.value_numbers[iteration.selection.one_hot.indices], []).append(iteration)
    if len(slots) == 1 or any(rank_of(indices) != 1 for indices in slots):
        return [(chain, understand(chain, graph_index))]
    if any(iteration.through is not None for iteration in chain.iterations):
        raise RefusedError("the experts are chosen by different indices, and their rows are lined up")
    if any(iteration.overwrites for iteration in chain.iterations):
        raise RefusedError("rows are overwritten, not added to, and a token may have several experts")
    parts = [Chain(tuple(iterations)) for iterations in slots.values()]
    blocks = [understand(part, graph_index) for part in parts]
    try:
        return [(chain, _joined(blocks, chain, graph_index.value_numbers))]
    except RefusedError:
        if [iteration for part in parts for iteration in part.iterations] != list(chain.iterations):
            raise
        return list(zip(parts, blocks, strict=True))


def _joined(blocks: Sequence[Experts], chain: Chain, value_numbers: Mapping[fx.Node, fx.Node]) -> Experts:
    """One block of those of all slots."""
    first = blocks[0]
    for slot, block in enumerate(blocks):
        if (block.count, block.weights) != (first.count, first.weights):
            raise RefusedError(f"slot {slot} uses other experts than slot 0")
        if text_of(block.body) != text_of(first.body):
            raise RefusedError(f"slot {slot} computes something else than slot 0, at {block.line}")
    columns = [tuple(column) for column in zip(*(block.shared for block in blocks), strict=True)]
    own = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    body = _for_pairs(first.body, own)
    shared = [
        _over_slots(column, value_numbers) if place in own else column[0]
        for place, column in enumerate(columns)
    ]
    return dataclasses.replace(
        first,
        indices=_over_slots([block.indices for block in blocks], value_numbers),
        body=body,
        shared=tuple(shared),
        start=chain.iterations[0].before,
        result=chain.iterations[-1].after,
        line=chain.line,
    )


def _for_pairs(body: fx.GraphModule, own: Sequence[int]) -> fx.GraphModule:
    """A body whose shared values at these places have an axis of slots behind that of the tokens."""
    body = copy.deepcopy(body)
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    token, slot = placeholders[:2]
    for place in own:
        value = placeholders[_ROWS + place]
        for user in list(value.users):
            if user.target is not _aten.index.Tensor or list(arguments(user)[1]) != [token]:
                where = line_of(user.meta.get("stack_trace"))
                raise RefusedError(f"a slot reads more than its own tokens' rows of a value, at {where}")
            user.args = (value, [token, slot])
    body.recompile()
    return body


def _over_slots(column: Sequence[fx.Node], value_numbers: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The values of each slot, (N, ...), as one (N, k, ...): where it was taken apart, or put together."""
    first = column[0]
    whole = _taken_apart(column, value_numbers)
    if whole is not None:
        return whole
    targets = {(node.target, repr((arguments(node)[1:], node.kwargs))) for node in column}
    if len(targets) == 1 and first.target in (_aten.unsqueeze.default, _aten._to_copy.default):
        sources = [arguments(node)[0] for node in column]
        shift = first.target is _aten.unsqueeze.default
        axes = arguments(first)[1:]
        if not shift or axes[0] % (rank_of(first)) > 0:
            moved = (axes[0] % rank_of(first) + 1,) if shift else axes
            return derived(first, first.target, _over_slots(sources, value_numbers), *moved, **first.kwargs)
    return derived(first, _aten.stack.default, list(column), 1)


def _taken_apart(column: Sequence[fx.Node], value_numbers: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """(N, k, ...) where each of the values is `whole[:, slot]`."""
    whole = set()
    for slot, node in enumerate(column):
        if node.target is not _aten.select.int or arguments(node)[2] != slot:
            return None
        source, axis = arguments(node)[:2]
        if axis % rank_of(source) != 1 or not same_size(shape_of(source)[1], len(column)):
            return None
        whole.add(value_numbers[source])
    return whole.pop() if len(whole) == 1 else None
