"""Boxes of a picture that repeat each other become one: `8 × moe.experts.…`, `7 × Mul, ScatterND`.

Two boxes are alike if they are of one module, or of numbered siblings, and have as many nodes of each operator.
Numbered modules that follow each other (layers) stay apart: their order is what a picture shows. The results of experts
that are added up one after the other are nodes of one module, and go together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

import onnx_ir as ir

from moe_export.export.onnx.bodies import reads, with_inner
from moe_export.pictures.groups import Group

_LEAST = 3  # two boxes beside each other are read at a glance


def collapsed(groups: Sequence[Group]) -> list[Group]:
    """The boxes, with those that repeat each other as one; in topological order if they were.

    Args:
        groups: Boxes that form no cycle, which the result does not either.
    """
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        alike[_kind(group)].append(place)
    feeds = _feeds(groups)
    into = list(range(len(groups)))  # the box that each one is a part of
    for places in alike.values():
        if len(places) < _LEAST or (groups[places[0]].whole and _any_leads_to_another(places, feeds)):
            continue
        trial = [places[0] if place in places else into[place] for place in range(len(groups))]
        if _order(trial, feeds) is not None:
            into = trial
    order = _order(into, feeds)
    assert order is not None
    return [_merged([groups[part] for part in range(len(groups)) if into[part] == place]) for place in order]


def _kind(group: Group) -> tuple[object, ...]:
    """What boxes that repeat each other have in common."""
    operators = Counter(node.op_type for each in group.nodes for node in with_inner(each))
    return _pattern(group.path) if group.whole else group.path, group.whole, frozenset(operators.items())


def _pattern(path: str) -> str:
    """`moe.experts.3` → `moe.experts.…`."""
    outer, _, last = path.rpartition(".")
    return f"{outer}.…" if outer and last.isdigit() else path


def _merged(parts: Sequence[Group]) -> Group:
    if len(parts) == 1:
        return parts[0]
    nodes = [node for part in parts for node in part.nodes]
    sizes = [node for part in parts for node in part.sizes]
    path = _pattern(parts[0].path) if parts[0].whole else parts[0].path
    return replace(parts[0], path=path, nodes=nodes, sizes=sizes, repeats=len(parts))


def _feeds(groups: Sequence[Group]) -> list[set[int]]:
    """For each box, those that read what it makes."""
    home: dict[ir.Node, int] = {node: place for place, group in enumerate(groups) for node in group.nodes}
    feeds: list[set[int]] = [set() for _ in groups]
    for node, place in home.items():
        for value in reads(node):
            maker = value.producer()
            source = home.get(maker, place) if maker is not None else place
            if source != place:
                feeds[source].add(place)
    return feeds


def _any_leads_to_another(places: Collection[int], feeds: Sequence[Collection[int]]) -> bool:
    """Whether a path leads from one of these boxes to another."""
    for start in places:
        waiting, seen = list(feeds[start]), set[int]()
        while waiting:
            place = waiting.pop()
            if place not in seen:
                seen.add(place)
                waiting += feeds[place]
        if seen & set(places):
            return True
    return False


def _order(into: Sequence[int], feeds: Sequence[Collection[int]]) -> list[int] | None:
    """The boxes that are left in topological order, as near to their old one as can be; None if they form a cycle."""
    left = dict.fromkeys(into)
    follows: dict[int, set[int]] = {place: set() for place in left}
    for source, targets in enumerate(feeds):
        for target in targets:
            if into[source] != into[target]:
                follows[into[target]].add(into[source])
    order: list[int] = []
    while left:
        ready = next((place for place in left if not follows[place] - set(order)), None)
        if ready is None:
            return None
        order.append(ready)
        del left[ready]
    return order
