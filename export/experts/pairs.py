"""Find MoE blocks that compute all token-expert pairs at once, and extract the computation of one expert.

Weights are looked up by the chosen experts (`w[idx]`, then `bmm` or an einsum), or multiplied with rows that are
sorted by expert (`grouped_mm`); a block ends where the rows of a token's k slots are added up. See `experts/rows`.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.shapes import rank_of, shape_of
from moe_export.export.experts.body import Experts
from moe_export.export.experts.combine import Combination, combination
from moe_export.export.experts.inline import inlined
from moe_export.export.experts.notes import named
from moe_export.export.experts.picked import Picked
from moe_export.export.experts.row_rules import rows_after
from moe_export.export.experts.rows import PairBody, Region, Rows
from moe_export.export.frontend.source import line_of
from moe_export.export.gates.region import ancestors
from moe_export.export.sizes import fixed

_aten = torch.ops.aten

_LOOKUPS = {_aten.index.Tensor, _aten.index_select.default}
_FIRST_RANK = 3  # weights are stacks of matrices (E, a, b); a matrix may be a bias, or a vocabulary


@dataclass(frozen=True)
class Root:
    """Integers by which weights of experts are looked up.

    Attributes:
        index: The integers.
        choices: Candidates for the choice of experts that they come from, (N, k) or (N,), in graph order.
        count: E.
        wraps: Whether the lookup takes -1 for the last expert.
        line: `file:line` of the lookup.
    """

    index: fx.Node
    choices: tuple[fx.Node, ...]
    count: int
    wraps: bool
    line: str | None


@dataclass(frozen=True)
class Loop:
    """A loop over experts that was understood by itself.

    Attributes:
        experts: What it computes; its "tokens" may be pairs.
        through: (S,), the rows to which a loop over pairs adds theirs; None if it adds to those that it reads.
    """

    experts: Experts
    through: fx.Node | None


@dataclass(frozen=True)
class Found:
    """A block, and the values that follow from its choice."""

    block: Experts
    values: frozenset[fx.Node]


def find_roots(
    graph: fx.Graph, loops: Mapping[fx.Node, Loop], picked: Mapping[fx.Node, Picked]
) -> tuple[Root, ...]:
    """Every lookup of weights, or of the experts' results, by computed integers, in graph order.

    Args:
        graph: The traced program.
        loops: Loops over experts that were understood, by the node that each ends in.
        picked: The operators that pick results.
    """
    found: dict[fx.Node, Root] = {}
    for node in graph.nodes:
        own = picked.get(node)
        for index, count in [(own.numbers, own.count)] if own else _lookups(node, loops):
            if index not in found:
                choices = _choices(index)
                if node in loops:  # as a loop by itself, it is understood already
                    choices = tuple(choice for choice in choices if choice is not index)
                wraps = node.target is _aten.index.Tensor
                found[index] = Root(index, choices, count, wraps, line_of(node.meta.get("stack_trace")))
    return tuple(root for root in found.values() if root.choices)


def _lookups(node: fx.Node, loops: Mapping[fx.Node, Loop]) -> Iterator[tuple[fx.Node, int]]:
    """The integers by which a node looks up weights of experts, and E."""
    if node in loops:
        yield loops[node].experts.indices, loops[node].experts.count
        return
    stack: object = None
    index: object = None
    if node.target is _aten.index.Tensor and len(node.args[1]) == 1:  # type: ignore[arg-type]
        stack, index = node.args[0], node.args[1][0]  # type: ignore[index]
    elif node.target is _aten.index_select.default and node.args[1] == 0:
        stack, index = node.args[0], node.args[2]
    if isinstance(stack, fx.Node) and isinstance(index, fx.Node) and rank_of(stack) >= _FIRST_RANK:
        size = fixed(shape_of(stack)[0])
        if size is not None:
            yield index, size


def _choices(index: fx.Node) -> tuple[fx.Node, ...]:
    """The values of rank 1 or 2 that integers are computed from by arithmetic on integers, in graph order."""
    stack, seen = [index], {index}
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen and _is_integers(source):
                seen.add(source)
                stack.append(source)
    fits = {node for node in seen if rank_of(node) in (1, 2) and node.target not in _COUNTING}
    return tuple(node for node in index.graph.nodes if node in fits)


_COUNTING = {_aten.arange.default, _aten.arange.start, _aten.arange.start_step}


def _is_integers(node: fx.Node) -> bool:
    """Whether a node is a tensor of integers, a sort of one, or one of the counts that code keeps as floats."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return node.target is not _aten.topk.default and all(
            isinstance(each, torch.Tensor) and not each.dtype.is_floating_point for each in value
        )
    counted = node.target in (
        _aten._to_copy.default,
        _aten.histc.default,
        _aten.cumsum.default,
        _aten.scatter.value,
    )
    return (
        isinstance(value, torch.Tensor) and value.dim() > 0 and (counted or not value.dtype.is_floating_point)
    )


def understand_pairs(
    root: Root, loops: Mapping[fx.Node, Loop], picked: Mapping[fx.Node, Picked]
) -> Found | None:
    """The block in which weights, or results, are looked up; None if there is none.

    Raises:
        RefusedError: No candidate for the choice leads to a body; the reason for the first one.
    """
    why: RefusedError | None = None
    for indices in root.choices:
        if not has_slots(indices):
            continue
        try:
            region = region_from(indices, root.count, picked)
            found = block_in(region, loops, line=root.line, wraps=root.wraps)
        except RefusedError as error:  # perhaps a token's number, from which its expert's is computed
            why = why or error
            continue
        if found is not None:
            return found
    if why is not None:
        raise why
    return None


def has_slots(indices: fx.Node) -> bool:
    """Whether the second axis of chosen experts, if there is one, may be that of slots: how many there are is fixed."""
    return rank_of(indices) < 2 or fixed(shape_of(indices)[1]) is not None


def region_from(indices: fx.Node, count: int, picked: Mapping[fx.Node, Picked] | None = None) -> Region:
    """What is known where chosen experts, (N, k) or (N,), are all that is known; `count` is E."""
    region = Region(indices, count, {}, {node: each.rows for node, each in (picked or {}).items()})
    region.rows[indices] = Rows(
        rank_of(indices), None, lambda body: _number(body, rank_of(indices)), "expert", constant=True
    )
    return region


def block_in(
    region: Region,
    loops: Mapping[fx.Node, Loop],
    *,
    line: str | None,
    wraps: bool = False,
    body: type[PairBody] = PairBody,
) -> Found | None:
    """The block that the values of a region are part of; None if there is none.

    Args:
        region: What is known at first; grows.
        loops: Loops over experts that were understood, by the node that each ends in.
        line: `file:line` of the block.
        wraps: See `Experts`.
        body: Writes the body.

    Raises:
        RefusedError: What is computed for a pair does not follow from that pair alone.
    """
    end = follow(region, loops) or _single(region)
    if end is None:
        return None
    writer = body(region)
    value = end.make(writer)
    block = Experts(
        indices=region.indices,
        count=region.count,
        body=writer.module(value),
        shared=tuple(writer.shared),
        weights=tuple(writer.weights),
        start=end.start,
        result=end.result,
        line=line,
        wraps=wraps,
    )
    _refuse_mixed(region, block)
    return Found(block, frozenset(region.rows))


def _refuse_mixed(region: Region, block: Experts) -> None:
    """Refuse a block whose experts read a value that was computed from rows of several pairs."""
    rows_of_pairs = [node for node, rows in region.rows.items() if rows.weighs and not rows.constant]
    behind = ancestors(block.shared, since=min(rows_of_pairs)) if rows_of_pairs else set()
    mixed = [node for node in rows_of_pairs if node in behind]
    if mixed:
        mixes = sorted(
            user for node in mixed for user in node.users if user in behind and user not in region.rows
        )
        where = named(mixes[0] if mixes else mixed[-1])
        raise RefusedError(f"the experts mix rows: what pairs get depends on other pairs, after {where}")


def _number(body: PairBody, lead: int) -> fx.Node:
    """The expert's number, (1,) or (1, 1)."""
    return body.expert if lead == 1 else body.as_rows(body.expert)


def follow(region: Region, loops: Mapping[fx.Node, Loop]) -> Combination | None:
    """Follow the choice through the graph, up to where the slots of a token are added up; None if they never are."""
    places = _Places(region.indices.graph)
    ends: dict[fx.Node, list[fx.Node]] = {}
    for node, loop in loops.items():
        ends.setdefault(loop.experts.indices, []).append(node)
    known_first = list(region.rows)
    waiting = places.after(user for node in known_first for user in (*node.users, *ends.get(node, ())))
    while waiting:
        node = heapq.heappop(waiting)[1]
        if node in region.rows or node.op != "call_function":
            continue
        end = _loop(region, node, loops[node]) if node in loops else combination(region, node)
        if end is not None:
            return end
        known = rows_after(region, node) if node not in loops else region.rows.get(node)
        if known is not None:
            region.rows[node] = known
            for following in places.after([*node.users, *ends.get(node, ())]):
                heapq.heappush(waiting, following)
    return None


class _Places:
    """The nodes of a graph by their order."""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: place for place, node in enumerate(graph.nodes)}

    def after(self, nodes: Iterable[fx.Node]) -> list[tuple[int, fx.Node]]:
        """(place, node) of these nodes, each once, in graph order."""
        return sorted((self._order[node], node) for node in set(nodes))


def _loop(region: Region, node: fx.Node, loop: Loop) -> Combination | None:
    """Add a loop to the region; its combination, if it adds its rows to those of their tokens."""
    rows = inlined(region, loop.experts, adds=loop.through is not None)
    if rows is None:
        return None
    region.rows[node] = rows
    if loop.through is None:
        return None
    tokens = region.rows.get(loop.through)
    if tokens is None or tokens.number != "token" or tokens.where != rows.where:
        del region.rows[node]
        return None
    return Combination(node, loop.experts.start, rows.make)


def _single(region: Region) -> Combination | None:
    """With one slot a token, nothing is added up: the block ends in the one value that is used outside."""
    if region.slots != 1:
        return None
    ends = [
        node
        for node, rows in region.rows.items()
        if rows.weighs
        and not rows.constant
        and rows.where == (1, None)
        and rank_of(node) > 1
        and node.target is not operator.getitem
        and any(user not in region.rows for user in node.users)
    ]
    if not ends:
        return None
    if len(ends) > 1:
        raise RefusedError("several values of the experts are used after them")
    return Combination(ends[0], None, lambda body: body.value(ends[0]))
