"""Experts that no block was found for, by an axis that runs over the experts of a choice (`axes/analysis`).

It is an axis of stacked weights, (E, a, b), or the one along which the results of E modules are put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx

from moe_export.export.axes.choice import Choice, as_choice
from moe_export.export.axes.extents import Extent, leaves
from moe_export.export.axes.meaning import Meanings
from moe_export.export.axes.shapes import arguments, rank_of
from moe_export.export.experts.body import Experts
from moe_export.export.experts.lost import Way
from moe_export.export.gates.region import ancestors, descendants
from moe_export.export.tracing.weight_inputs import is_weight

_aten = torch.ops.aten
_JOINS = {_aten.cat.default, _aten.stack.default}
_STACK_RANK = 3


def not_covered(graph: fx.Graph, blocks: Sequence[Experts]) -> tuple[Choice, ...]:
    """The choices that no block comes from."""
    choices = [choice for choice in map(as_choice, graph.nodes) if choice is not None]
    covered = ancestors(block.indices for block in blocks)
    return tuple(choice for choice in choices if choice.operator not in covered)


def unrecognised(
    graph: fx.Graph, choices: Sequence[Choice], known: Meanings
) -> Iterator[tuple[fx.Node, Way]]:
    """Each group of experts of some choices.

    Yields:
        The first value that their weights are used for, and the values from the choice to where the two meet.
    """
    groups: dict[frozenset[Extent], list[Choice]] = {}
    for choice in choices:
        groups.setdefault(frozenset(known.axes(choice.scores)[-1]), []).append(choice)
    for experts, group in groups.items():
        made = [node for node in graph.nodes if _is_of_all(node, known, experts)]
        below = descendants(made)
        own = descendants(choice.operator for choice in group) & _leading(graph, below) - {
            graph.output_node()
        }
        if not own.isdisjoint(below):
            users = [user for node in made for user in node.users]
            yield min(users), Way(frozenset(own), known)


def _is_of_all(node: fx.Node, known: Meanings, experts: Iterable[Extent]) -> bool:
    """Whether a value is stacked weights of these experts, or what their modules computed, put together."""
    axes = known.axes(node)
    if is_weight(node):
        return rank_of(node) >= _STACK_RANK and not set(leaves(axes)).isdisjoint(experts)
    if node.target not in _JOINS or set(leaves(axes)).isdisjoint(experts):
        return False
    parts, axis = arguments(node)[0], (*arguments(node), 0)[1]
    if len(parts) < 2 or set(axes[axis]).isdisjoint(experts):
        return False
    weights = [{each for each in ancestors([part]) if is_weight(each)} for part in parts[:2]]
    return weights[0] != weights[1]


def _leading(graph: fx.Graph, ends: set[fx.Node]) -> set[fx.Node]:
    """These nodes and everything that they depend on."""
    found = set(ends)
    for node in reversed(graph.nodes):
        if not found.isdisjoint(node.users):
            found.add(node)
    return found
