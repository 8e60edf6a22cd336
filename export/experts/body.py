"""Extract the computation of one expert from a chain of iterations, and make sure that every expert's is the same.

A body is a function of the pairs' tokens and slots, of the expert's number, of values that all experts share, and
of the expert's own weights: `body(token (R,), slot (R,), expert (1,), *shared, *weights) → (R, H)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from moe_export.errors import RefusedError
from moe_export.export.axes.chosen import name_once, names_experts
from moe_export.export.axes.one_hot import one_hot_mask_of
from moe_export.export.axes.operators import CASTS, ZEROS
from moe_export.export.axes.shapes import arguments, rank_of
from moe_export.export.experts.canonical import Walk, value_numbering
from moe_export.export.experts.find import Chain, Iteration
from moe_export.export.experts.notes import named
from moe_export.export.frontend.source import line_of
from moe_export.export.gates.region import descendants, is_size
from moe_export.export.sizes import same_size
from moe_export.export.tracing.weight_inputs import is_weight

_aten = torch.ops.aten
_ANYTHING = {_aten.empty_like.default, _aten.empty.memory_format, _aten.new_empty.default}


@dataclass(frozen=True)
class Weight:
    """One weight of the expert body: a tensor for each expert, or one stack of all of them.

    Attributes:
        separate: E nodes, in the order of the experts; empty for a stack.
        stack: A node (E, ...); None for separate tensors.
    """

    separate: tuple[fx.Node, ...] = ()
    stack: fx.Node | None = None


@dataclass(frozen=True)
class Experts:
    """An MoE block as it was understood.

    Attributes:
        indices: (N, k) or (N,), the chosen experts.
        count: E.
        body: The computation of one expert (see the module's docstring).
        shared: Nodes that every expert reads, in the order of the body's inputs.
        weights: The experts' own weights, in the order of the body's inputs.
        start: (N, H), what the experts' rows are added to; None for nothing.
        overwrites: The row of a token that has an expert replaces its row of `start`, instead of being added to it.
        wraps: An index from -E to -1 counts from the last expert, as in a lookup `w[idx]`; otherwise it names none.
        result: The node that the block ends in.
        line: `file:line` of the block.
    """

    indices: fx.Node
    count: int
    body: fx.GraphModule
    shared: tuple[fx.Node, ...]
    weights: tuple[Weight, ...]
    start: fx.Node | None
    result: fx.Node
    line: str | None
    overwrites: bool = False
    wraps: bool = False

    @property
    def slots(self) -> int:
        """k: choices of a token."""
        shape = self.indices.meta["val"].shape
        return int(shape[1]) if len(shape) == 2 else 1


@dataclass(frozen=True)
class GraphIndex:
    """What is known about a whole graph, computed once for all of its loops.

    Attributes:
        sums: The nodes in which a loop adds an expert's rows; what follows one belongs to no single expert any more.
        value_numbers: Each node → the first node that computes the same.
        fixing: Chosen indices → expert → the nodes that select its part of the mask: `idx == e`, `mask[..., e]`.
    """

    sums: frozenset[fx.Node]
    value_numbers: Mapping[fx.Node, fx.Node]
    fixing: Mapping[fx.Node, Mapping[int, set[fx.Node]]]

    @staticmethod
    def of(graph: fx.Graph, chains: Sequence[Chain]) -> GraphIndex:
        value_numbers = value_numbering(graph) if chains else {}
        sums = frozenset(iteration.after for chain in chains for iteration in chain.iterations)
        return GraphIndex(sums, value_numbers, _fixing_nodes(graph, value_numbers) if chains else {})


def understand(chain: Chain, graph_index: GraphIndex) -> Experts:
    """Find out what a chain computes.

    Args:
        chain: The iterations of a loop.
        graph_index: The graph that it is in.

    Raises:
        RefusedError: The experts differ in more than their weights, or the chain is incomplete.
    """
    ordered = sorted(chain.iterations, key=lambda iteration: iteration.selection.one_hot.expert or 0)
    numbers = [iteration.selection.one_hot.expert for iteration in ordered]
    if numbers != list(range(len(numbers))):
        raise RefusedError(f"the loop runs over experts {numbers}, not over 0 to {len(numbers) - 1}")
    indices = graph_index.value_numbers[chain.indices]
    if any(
        graph_index.value_numbers[iteration.selection.one_hot.indices] is not indices for iteration in ordered
    ):
        raise RefusedError("the experts are chosen by different indices")
    if any(iteration.through is not chain.through for iteration in ordered):
        raise RefusedError("the experts' rows are added to different places")
    overwrites = any(iteration.overwrites for iteration in ordered)
    if overwrites and chain.indices.meta["val"].dim() > 1:
        raise RefusedError("rows are overwritten, not added to, and a token may have several experts")
    fixing = graph_index.fixing.get(indices, {})
    parts = [
        _Part(iteration, fixing.get(number, set()), graph_index) for number, iteration in enumerate(ordered)
    ]
    shared, weights, kinds = sort_leaves([part.walk for part in parts], graph_index.value_numbers)
    before = chain.iterations[0].before
    # Then `start` does not matter: every row is overwritten, or was never set.
    settled = overwrites and (names_experts(indices, len(ordered)) or before.target in _ANYTHING)
    return Experts(
        indices=indices,
        count=len(ordered),
        body=parts[0].module(kinds),
        shared=shared,
        weights=weights,
        start=None if settled else before,
        result=chain.iterations[-1].after,
        line=chain.line,
        overwrites=overwrites and not settled and before.target not in ZEROS,
    )


def _fixing_nodes(
    graph: fx.Graph, value_numbers: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, dict[int, set[fx.Node]]]:
    found: dict[fx.Node, dict[int, set[fx.Node]]] = {}
    for node in graph.nodes:
        one_hot = one_hot_mask_of(node) if node.target in (_aten.eq.Scalar, _aten.select.int) else None
        if one_hot is None or one_hot.expert is None:
            continue
        before = one_hot_mask_of(node.args[0])
        if before is None or before.expert is None:
            found.setdefault(value_numbers[one_hot.indices], {}).setdefault(one_hot.expert, set()).add(node)
    return found


class _Part:
    """What one iteration computes.

    Attributes:
        walk: Its nodes in a fixed order, and the nodes outside that they read.
    """

    def __init__(self, iteration: Iteration, fixing: set[fx.Node], graph_index: GraphIndex) -> None:
        self._rows = iteration.selection
        self._fixing = fixing
        self._value_numbers = graph_index.value_numbers
        # what depends on the pairs or the number of one expert, up to where its rows are added
        self._dependent = descendants([*iteration.selection.rows, *fixing], before=graph_index.sums)
        self._value = iteration.value
        self._of_weights: dict[fx.Node, bool] = {}
        self.walk = Walk(iteration.value, self._end, self._canonical, self._row_kind, self._arguments)

    def _end(self, node: fx.Node) -> str | None:
        return None if node in self._dependent or self._is_of_weights(node) else "leaf"

    def _is_of_weights(self, node: fx.Node) -> bool:
        """Whether a node only rearranges weights (`w.t()`, `w[e].t()`); then the weights themselves are the leaves."""
        if node not in self._of_weights:
            inputs = node.all_input_nodes
            own = node.target is _aten.select.int and node.args[1:] == (0, self._rows.one_hot.expert)
            self._of_weights[node] = (
                node.op == "call_function"
                and not own
                and bool(inputs)
                and not is_size(node)
                and all(self._is_weight(source) or self._is_of_weights(source) for source in inputs)
            )
        return self._of_weights[node]

    def _is_weight(self, node: fx.Node) -> bool:
        if node.target is _aten.select.int and node.args[1:] == (0, self._rows.one_hot.expert):
            source = node.args[0]
            return isinstance(source, fx.Node) and (self._is_weight(source) or self._is_of_weights(source))
        return node.op == "placeholder" and is_weight(node)

    def _canonical(self, node: fx.Node) -> fx.Node:
        """The first node that computes the same, unless the node belongs to this iteration alone."""
        return node if node in self._dependent else self._value_numbers[node]

    def _row_kind(self, node: fx.Node, user: fx.Node | None) -> str | None:
        """Whether a node stands for the rows' tokens or slots where `user` takes it."""
        if node is self._rows.token:
            return "token"
        if node is self._rows.slot:
            return "slot"
        by_mask = user is not None and user.target is _aten.index.Tensor and list(user.args[1]) == [node]  # type: ignore[arg-type]
        mask = self._rows.mask
        return (
            "token"
            if by_mask and mask is not None and self._value_numbers[node] is self._value_numbers[mask]
            else None
        )

    def _arguments(self, node: fx.Node) -> Any:
        """A node's arguments without the one number in which the iterations differ."""
        if node not in self._fixing:
            return node.args
        return tuple("expert" if arg == self._rows.one_hot.expert else arg for arg in node.args)

    def _finds_slot(self, node: fx.Node) -> bool:
        """Whether a node finds the slots of the rows: `(indices == e)[token].int().argmax(-1)`."""
        if node.target is not _aten.argmax.default or len(node.args) < 2 or node.args[1] not in (-1, 1):
            return False
        marks = node.args[0]
        while isinstance(marks, fx.Node) and marks.target in CASTS:
            marks = marks.args[0]
        if not isinstance(marks, fx.Node) or marks.args[0] not in self._fixing or rank_of(marks) != 2:
            return False
        if marks.target is _aten.index.Tensor:
            places = list(marks.args[1])  # type: ignore[arg-type]
        else:
            places = (
                [marks.args[2]] if marks.target is _aten.index_select.default and marks.args[1] == 0 else []
            )
        if (
            len(places) != 1
            or not isinstance(places[0], fx.Node)
            or self._row_kind(places[0], marks) != "token"
        ):
            return False
        return name_once(self._rows.one_hot.indices)

    def _picks_pairs(self, node: fx.Node) -> bool:
        """Whether a node picks, of a value (N, k, ...), the entries of the rows: `weights[indices == e]`.

        They come in the order of the tokens. So do the rows where they are picked by a mask of tokens, and there are as
        many, if no token names an expert twice.
        """
        if node.target is not _aten.index.Tensor or self._rows.one_hot.axes != ("token",):
            return False
        places = list(node.args[1])  # type: ignore[arg-type]
        one = len(places) == 1 and places[0] in self._fixing and rank_of(places[0]) == 2
        return one and name_once(self._rows.one_hot.indices)

    def module(self, kinds: list[str]) -> fx.GraphModule:
        """The body; `kinds` says what each leaf is (see `sort_leaves`). Shared inputs come first."""
        graph = fx.Graph()
        rows = {name: graph.placeholder(name) for name in ("token", "slot", "expert")}
        copies: dict[fx.Node, fx.Node] = {}
        leaves = dict(zip(self.walk.leaves, kinds, strict=True))
        for leaf, kind in sorted(leaves.items(), key=lambda item: item[1] == "weight"):
            copies[leaf] = graph.placeholder(f"{'weight' if kind == 'weight' else 'shared'}_{len(copies)}")
            copies[leaf].meta = dict(leaf.args[0].meta if kind == "entry" else leaf.meta)  # type: ignore[union-attr]
        for leaf, kind in leaves.items():
            if kind == "entry":
                copies[leaf] = _for_any_expert(graph, leaf, copies[leaf], rows["expert"])

        def copied(source: fx.Node, user: fx.Node | None) -> fx.Node:
            kind = self._row_kind(source, user)
            return rows[kind] if kind else copies[self._canonical(source)]

        for node in self.walk.nodes:
            if node in self._fixing:
                copies[node] = _for_any_expert(graph, node, copied(node.args[0], node), rows["expert"])  # type: ignore[arg-type]
            elif self._finds_slot(node):
                kept = len(node.args) > 2 and node.args[2]
                slot = rows["slot"]
                copies[node] = graph.call_function(_aten.unsqueeze.default, (slot, 1)) if kept else slot
            elif self._picks_pairs(node):
                value = copied(node.args[0], node)  # type: ignore[arg-type]
                copies[node] = graph.call_function(_aten.index.Tensor, (value, [rows["token"], rows["slot"]]))
            else:
                copies[node] = graph.node_copy(node, partial(copied, user=node))
        graph.output(copied(self._value, None))
        graph.eliminate_dead_code()
        graph.lint()
        return fx.GraphModule(nn.Module(), graph)


def _for_any_expert(graph: fx.Graph, node: fx.Node, source: fx.Node, expert: fx.Node) -> fx.Node:
    """A node that selects expert e's part of a mask, for an expert (1,) that is only known at run time."""
    if node.target is _aten.eq.Scalar:
        return graph.call_function(_aten.eq.Tensor, (source, expert))
    axis = node.args[1]
    one = graph.call_function(_aten.index_select.default, (source, axis, expert))
    return graph.call_function(_aten.squeeze.dim, (one, axis))


def sort_leaves(
    walks: Sequence[Walk], value_numbers: Mapping[fx.Node, fx.Node]
) -> tuple[tuple[fx.Node, ...], tuple[Weight, ...], list[str]]:
    """Compare the iterations, and separate the values that all share from the weights that each has.

    Returns:
        The shared nodes, the weights, and for each leaf "shared", "weight", or "entry": each expert's part of a shared
        value, `gates[:, e]`.

    Raises:
        RefusedError: The iterations differ in more than their weights.
    """
    first = walks[0]
    for number, walk in enumerate(walks):
        if len(walk.steps) != len(first.steps) or len(walk.leaves) != len(first.leaves):
            line = line_of(walk.nodes[-1].meta.get("stack_trace")) if walk.nodes else "the end"
            raise RefusedError(f"expert {number} computes something else than expert 0, at {line}")
        for index, (mine, other) in enumerate(zip(walk.steps, first.steps, strict=True)):
            if mine != other:
                line = line_of(walk.nodes[index].meta.get("stack_trace"))
                raise RefusedError(f"expert {number} computes something else than expert 0, at {line}")
    shared: list[fx.Node] = []
    weights: list[Weight] = []
    kinds: list[str] = []
    for column in zip(*(walk.leaves for walk in walks), strict=True):
        if is_size(column[0]):
            raise RefusedError(f"the experts use a size of a value outside them, {named(column[0])}")
        if all(leaf is column[0] for leaf in column):
            shared.append(column[0])
            kinds.append("shared")
            continue
        stack = _stack(column, value_numbers)
        if stack is not None and stack[1] > 0:
            shared.append(stack[0])
            kinds.append("entry")
        else:
            weights.append(_weight(column, stack[0] if stack is not None else None))
            kinds.append("weight")
    return tuple(shared), tuple(weights), kinds


def _stack(column: Sequence[fx.Node], value_numbers: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, int] | None:
    """What expert e's node is entry e of, and along which axis; None if they are no entries of one value."""
    if any(leaf.target is not _aten.select.int for leaf in column):
        return None
    sources, axes, places = zip(*map(arguments, column), strict=True)
    bases = {
        (value_numbers[source], axis % rank_of(source)) for source, axis in zip(sources, axes, strict=True)
    }
    return bases.pop() if len(bases) == 1 and list(places) == list(range(len(column))) else None


def _weight(column: tuple[fx.Node, ...], stack: fx.Node | None) -> Weight:
    if all(leaf.op == "placeholder" for leaf in column):
        _require_same_shapes(column)
        return Weight(separate=column)
    if stack is not None:
        size = stack.meta["val"].shape[0]
        if not same_size(size, len(column)):
            raise RefusedError(
                f"{stack.name} holds the weights of {size} experts, and {len(column)} are used"
            )
        return Weight(stack=stack)
    raise RefusedError(f"{named(column[0])} differs from expert to expert, but is not each one's weight")


def _require_same_shapes(column: tuple[fx.Node, ...]) -> None:
    shapes: Mapping[tuple[int, ...], fx.Node] = {tuple(leaf.meta["val"].shape): leaf for leaf in column}
    if len(shapes) > 1:
        raise RefusedError(f"the experts' weights differ in shape: {', '.join(map(str, shapes))}")
