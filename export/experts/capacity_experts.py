"""The experts between two masks: from rows in their slots (E, C, M) to what each expert computes from them (E, C, H).

Either each expert's part is taken (`chunk`, `split`, `[e]`), computed by a module of its own, and put back together,
or all experts are computed at once with stacked weights. The computation of one expert on R rows is copied out of
that; `capacity_check` checks that it does the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.shapes import arguments, rank_of, shape_of
from moe_export.export.experts.body import Weight
from moe_export.export.experts.canonical import Walk
from moe_export.export.experts.capacity_views import Axis, Labels, View, pushed
from moe_export.export.experts.notes import named
from moe_export.export.frontend.source import line_of
from moe_export.export.gates.region import descendants, is_size
from moe_export.export.sizes import expression_of, fixed, same_shape, same_size
from moe_export.export.tracing.weight_inputs import is_weight

_aten = torch.ops.aten
_SHAPED = {
    _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.expand.default,
}  # fmt: skip


@dataclass(frozen=True)
class Core:
    """What one expert computes.

    Attributes:
        seed: The node that the rows replace, and its axes.
        result: The node that is computed, and its axes; "h" is the last one.
        nodes: The nodes between, in graph order.
        shared: The nodes it reads that all experts have in common.
        weights: The node it reads for each weight of the expert → that weight of all experts.
        stacked: Whether seed and result have an axis over experts, on which one expert is a single entry.
    """

    seed: View
    result: View
    nodes: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]
    weights: Mapping[fx.Node, Weight]
    stacked: bool


def core_of(slots: View, outputs: View, labels: Labels) -> Core:
    """Find what one expert computes.

    Args:
        slots: (e, g, c, m), in any order: the rows that the experts are given.
        outputs: (e, g, c, h), in any order: what they compute.
        labels: The labels of the block.

    Raises:
        RefusedError: The experts differ in more than their weights.
    """
    below = descendants([slots.node])
    joined = labels.peeled(outputs)
    if joined.node.target in (_aten.cat.default, _aten.stack.default):
        core = _of_parts(slots, joined, below, labels)
    else:
        core = _stacked(slots, outputs, below, labels)
    if core.result.axes[-1] != ("h",):
        raise RefusedError(
            f"the last axis of the experts' results, of {named(outputs.node)}, is not that of features"
        )
    return core


def _stacked(slots: View, outputs: View, below: set[fx.Node], labels: Labels) -> Core:
    count = labels.sizes["e"]
    while any(len(axis) > 1 for axis in slots.axes):  # (e * c, m): go on to the reshape that splits it
        following = [view for user in slots.node.users if (view := pushed(slots, user, labels)) is not None]
        if len(following) != 1:
            raise RefusedError("slots and experts share an axis")
        slots = following[0]
    walk = walk_between(outputs.node, {slots.node}, below, lambda node: False)
    weights, shared = {}, []
    for leaf in walk.leaves:
        if rank_of(leaf) > 1 and same_size(shape_of(leaf)[0], count):
            weights[leaf] = Weight(stack=leaf)
        else:
            shared.append(leaf)
    return Core(slots, outputs, tuple(walk.nodes), tuple(shared), weights, True)


def _of_parts(slots: View, joined: View, below: set[fx.Node], labels: Labels) -> Core:
    count = int(labels.sizes["e"])
    parts: Sequence[fx.Node] = arguments(joined.node)[0]
    axis = int((*arguments(joined.node), 0)[1] or 0) % len(joined.axes)
    if joined.axes[axis] != ("e",) or len(parts) != count:
        raise RefusedError(f"{len(parts)} results are put together, and there are {count} experts")
    axes: tuple[Axis, ...] = joined.axes[:axis] + joined.axes[axis + 1 :]
    if joined.node.target is _aten.cat.default:
        axes = (*joined.axes[:axis], (), *joined.axes[axis + 1 :])
    seeds = dict(_seeds(slots, labels))
    walks = []
    for number, part in enumerate(parts):
        mine = {node for node, (expert, _) in seeds.items() if expert == number}
        walks.append(walk_between(part, mine, below, partial(_is_place, number=number, count=count)))
    first = walks[0]
    for number, walk in enumerate(walks):
        if walk.steps != first.steps or len(walk.leaves) != len(first.leaves) or len(walk.seeds) != 1:
            where = line_of(parts[number].meta.get("stack_trace"))
            raise RefusedError(f"expert {number} computes something else than expert 0, at {where}")
    shared, weights = [], {}
    for column in zip(*(walk.leaves for walk in walks), strict=True):
        if all(leaf is column[0] for leaf in column):
            shared.append(column[0])
        else:
            weights[column[0]] = _own(column)
    seed = first.seeds[0]
    return Core(
        View(seed, seeds[seed][1]), View(parts[0], axes), tuple(first.nodes), tuple(shared), weights, False
    )


def _own(column: tuple[fx.Node, ...]) -> Weight:
    """The weights of all experts, from the nodes in the same place of each one's code."""
    if all(leaf.op == "placeholder" for leaf in column):
        if len({tuple(leaf.meta["val"].shape) for leaf in column}) > 1:
            raise RefusedError("the experts' weights differ in shape")
        return Weight(separate=column)
    bases = {leaf.all_input_nodes[0] for leaf in column}
    if len(bases) == 1:
        return Weight(stack=bases.pop())
    raise RefusedError(f"{named(column[0])} differs from expert to expert, but is not each one's weight")


def _is_place(node: fx.Node, number: int, count: int) -> bool:
    """Whether a node is one expert's part of stacked weights."""
    source = arguments(node)[0] if node.args else None
    if not isinstance(source, fx.Node) or not same_shape(shape_of(source)[:1], [count]):
        return False
    return node.target is _aten.select.int and arguments(node)[1:] == (0, number)


def _seeds(slots: View, labels: Labels) -> Sequence[tuple[fx.Node, tuple[int, tuple[Axis, ...]]]]:
    """Every part of the slots that belongs to one expert, with the expert's number and the part's axes."""
    found: list[tuple[fx.Node, tuple[int, tuple[Axis, ...]]]] = []
    waiting = [slots]
    while waiting:
        view = waiting.pop()
        for user in view.node.users:
            moved = pushed(view, user, labels)
            if moved is not None:
                waiting.append(moved)
            else:
                found += _taken(view, user)
    return found


def _taken(view: View, user: fx.Node) -> Sequence[tuple[fx.Node, tuple[int, tuple[Axis, ...]]]]:
    if ("e",) not in view.axes:
        return []
    place = view.axes.index(("e",))
    args = arguments(user)
    splits = user.target in (_aten.split.Tensor, _aten.split_with_sizes.default)
    dim = int((*args, 0, 0)[2 if splits else 1] or 0)
    if dim % len(view.axes) != place:
        return []
    without = view.axes[:place] + view.axes[place + 1 :]
    kept = (*view.axes[:place], (), *view.axes[place + 1 :])
    if user.target is _aten.select.int:
        return [(user, (args[2], without))]
    if user.target is _aten.slice.Tensor and len(args) == 4 and args[3] == args[2] + 1:
        return [(user, (args[2], kept))]
    ones = user.target is _aten.split.Tensor and args[1] == 1
    ones = ones or (user.target is _aten.split_with_sizes.default and set(args[1]) == {1})
    if ones or user.target is _aten.unbind.int:
        axes = kept if ones else without
        return [(part, (arguments(part)[1], axes)) for part in user.users if part.target is operator.getitem]
    return []


def walk_between(
    result: fx.Node,
    seeds: Collection[fx.Node],
    below: set[fx.Node],
    is_part: Callable[[fx.Node], bool],
) -> Walk:
    """The nodes between seeds and a result, including those that only rearrange weights.

    Args:
        result: The last node.
        seeds: Where to stop.
        below: The nodes that depend on the rows.
        is_part: Whether a node is one expert's part of stacked weights, and so a leaf.
    """

    def end(node: fx.Node) -> Any:
        if node in seeds:
            return "seed"
        if is_size(node) and node not in below:
            return ("size", hash(expression_of(node.meta["val"])))
        outside = node.op == "placeholder" or (node not in below and not _is_of_weights(node))
        return "leaf" if outside or is_part(node) else None

    return Walk(result, end)


def _is_of_weights(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return is_weight(node)
    return bool(node.all_input_nodes) and all(map(_is_of_weights, node.all_input_nodes))


def write_core(
    graph: fx.Graph, core: Core, rows: fx.Node, known: dict[fx.Node, fx.Node], labels: Labels
) -> fx.Node:
    """Write what one expert computes.

    Args:
        graph: The graph to write into.
        core: The computation.
        rows: (R, M), the expert's rows.
        known: Node that the core reads → the graph's input for it; weights come without an axis over experts.
        labels: The labels of the block.

    Returns:
        (R, H).

    Raises:
        RefusedError: The core uses a size that does not follow from experts, groups and slots.
    """
    widths = {"c": -1, "m": int(labels.sizes["m"])}
    copies: dict[fx.Node, Any] = dict(known)
    shape = [widths.get(axis[0], 1) if axis else 1 for axis in core.seed.axes]
    copies[core.seed.node] = graph.call_function(_aten.reshape.default, (rows, shape))
    if core.stacked:
        for leaf in core.weights:
            copies[leaf] = graph.call_function(_aten.unsqueeze.default, (known[leaf], 0))
    free = {size: "c" in of for size, of in sizes_of(labels).items()}

    def copied(node: fx.Node) -> Any:
        size = expression_of(node.meta["val"]) if is_size(node) else None
        if node not in copies and size in free:
            copies[node] = graph.call_function(_aten.sym_size.int, (rows, 0)) if free[size] else 1
        if node not in copies:
            raise RefusedError(f"the experts use a size of a value outside them, {named(node)}")
        return copies[node]

    for node in core.nodes:
        if is_size(node) and expression_of(node.meta["val"]) in free:
            continue
        args: Any = node.args
        if node.target in _SHAPED:
            args = (args[0], _for_rows(args[1], core, free, labels))
        args, kwargs = fx.map_arg(args, copied), fx.map_arg(node.kwargs, copied)
        copies[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    return graph.call_function(
        _aten.reshape.default, (copies[core.result.node], [-1, int(labels.sizes["h"])])
    )


def _for_rows(sizes: Sequence[Any], core: Core, free: Mapping[Any, bool], labels: Labels) -> list[Any]:
    """The sizes of a reshape for one expert instead of all, and R rows instead of the slots."""
    found = list(sizes)
    experts, slots = int(labels.sizes["e"]), fixed(labels.sizes["c"])
    if core.stacked and experts in found:
        found[found.index(experts)] = 1
    for place, size in enumerate(found):
        key = expression_of(size.meta["val"] if isinstance(size, fx.Node) else size)
        of_slots = free.get(key, slots is not None and key in (slots, experts * slots))
        if of_slots and -1 not in found:
            found[place] = -1
    return found


def sizes_of(labels: Labels) -> dict[Any, frozenset[str]]:
    """Free sizes that are products of experts, groups and slots: expression → the labels of the factors."""
    found: dict[str, frozenset[str]] = {}
    groups = [label for label in labels.sizes if label.startswith("g")]
    for mine in (["c"], *([group] for group in groups), [*groups, "c"], ["e", "c"], ["e", *groups, "c"]):
        size: Any = 1
        for label in mine:
            size = size * labels.sizes[label]
        if fixed(size) is None:
            found.setdefault(expression_of(size), frozenset(mine))
    return found
