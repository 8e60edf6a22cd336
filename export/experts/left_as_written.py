"""Code that clearly hands tokens to experts, and is no block: where it is, and which value lost its meaning.

Two signs of it. Rows that the data picks go through the weights of several experts, alike but for these weights, and
are added, or written, to rows that the data picks. Or an axis runs over the experts of a choice in stacked weights, or
in what several experts computed (`axes/analysis`). Where no block came of that, the choice is followed once more, up to
the first value of which it is not known what its axes run over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_export.export.axes.analysis import meanings_of
from moe_export.export.axes.choice import CARRIERS, Choice, as_choice, is_part
from moe_export.export.axes.extents import Extent, leaves
from moe_export.export.axes.meaning import Meanings
from moe_export.export.axes.operators import JOINS, SORTS
from moe_export.export.axes.shapes import arguments, named_axis, rank_of, shape_of
from moe_export.export.experts.body import Experts
from moe_export.export.experts.lost import Way
from moe_export.export.experts.notes import named
from moe_export.export.experts.pairs import Loop
from moe_export.export.frontend.source import line_of
from moe_export.export.gates.region import ancestors, descendants, is_float, is_size
from moe_export.export.gates.tokens import as_token_choice
from moe_export.export.tracing.weight_inputs import is_weight

_aten = torch.ops.aten

_WRITES: Mapping[Any, int] = {
    _aten.index_add.default: 2, _aten.index_put.default: 1, _aten.scatter_add.default: 2, _aten.index_copy.default: 2,
    _aten.scatter_reduce.two: 2, _aten.scatter.src: 2, _aten.masked_scatter.default: 1,
}  # fmt: skip
"""Operators that write rows; which argument says where."""
_CHOOSES = {
    _aten.nonzero.default, _aten.nonzero_numpy.default, _aten.where.default, _aten.argwhere.default,
    _aten.topk.default, _aten.argmax.default, _aten.max.dim, *SORTS, _aten.bucketize.Tensor,
}  # fmt: skip
_PICKS = {_aten.index.Tensor, _aten.index_select.default, _aten.masked_select.default, _aten.gather.default}
_PRODUCTS = {
    _aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default,
    _aten.convolution.default, _aten.conv2d.default, _aten.conv1d.default, _aten.einsum.default,
}  # fmt: skip
_ON_WEIGHTS = {_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten._to_copy.default}
_OF_STACKS = {_aten.bmm.default, _aten.baddbmm.default, _aten.matmul.default, _aten.einsum.default}
_STACK_RANK = 3  # stacked matrices (E, a, b)


@dataclass(frozen=True)
class _Product:
    """A product of picked rows with a weight.

    Attributes:
        weight: The weight.
        picks: The nodes that picked its rows.
    """

    weight: fx.Node
    picks: frozenset[fx.Node]


def reasons_left(
    graph: fx.Graph, blocks: Sequence[Experts], loops: Mapping[fx.Node, Loop], noted: Collection[str | None]
) -> Iterator[tuple[str | None, str]]:
    """Each place where rows of several experts come together, and no block was found: its line, and why.

    Args:
        graph: The traced program.
        blocks: The blocks that were found.
        loops: Loops over experts that were understood by themselves.
        noted: Lines of code of which it was said already why it is no block.
    """
    left, choices = list(_left_writes(graph, blocks)), _not_covered(graph, blocks)
    if not left and not choices:
        return
    meanings, told = meanings_of(graph), set[fx.Node]()
    for chain in left:
        way = Way.back_from(chain, meanings)
        told |= way.nodes
        if way.lines.isdisjoint(noted):
            yield line_of(chain[0].meta.get("stack_trace")), _reason(chain, way, loops)
    for first, way, choice in _unrecognised(graph, choices, meanings, _weights(blocks)):
        if choice.tokens is not None and choice.operator not in told:
            yield line_of(first.meta.get("stack_trace")), _chosen_by_experts(choice)
        elif choice.tokens is None and way.choices.isdisjoint(told) and way.lines.isdisjoint(noted):
            yield line_of(first.meta.get("stack_trace")), way.why(loops)


def _left_writes(graph: fx.Graph, blocks: Sequence[Experts]) -> Iterator[list[fx.Node]]:
    """Writes to rows that the data picks, one after the other, of rows of several experts; the last one first."""
    writes = {node for node in graph.nodes if node.target in _WRITES and _is_chosen(_where_to(node))}
    if not writes:
        return
    taken = {node for block in blocks for node in _of_block(block)}
    weights = _weights(blocks)
    seen = set[fx.Node]()
    for node in sorted(writes, reverse=True):
        if node in seen:
            continue
        chain = [node, *_before(node, writes)]
        seen.update(chain)
        products = [each for one in chain for each in _products(one)]
        understood = all(weights & {product.weight, *product.weight.all_input_nodes} for product in products)
        if taken.isdisjoint(chain) and not understood and _are_several(products):
            yield chain


def _weights(blocks: Sequence[Experts]) -> set[fx.Node | None]:
    return {each for block in blocks for weight in block.weights for each in (*weight.separate, weight.stack)}


def _where_to(write: fx.Node) -> fx.Node | None:
    """The rows that a node writes to."""
    index = arguments(write)[_WRITES[write.target]]
    found = index[0] if isinstance(index, (list, tuple)) and len(index) > 0 else index
    return found if isinstance(found, fx.Node) else None


def _is_chosen(index: fx.Node | None) -> bool:
    """Whether row numbers, or a mask of rows, follow from values of the data."""
    stack, seen = [index] if index is not None else [], set[fx.Node]()
    while stack:
        node = stack.pop()
        value = node.meta.get("val")
        if node.target in _CHOOSES or (isinstance(value, torch.Tensor) and value.dtype is torch.bool):
            return True
        for source in node.all_input_nodes:
            if source not in seen and not is_size(source) and not is_float(source):
                seen.add(source)
                stack.append(source)
    return False


def _of_block(block: Experts) -> Iterator[fx.Node]:
    """The nodes that a block stands for: what it ends in, and what lies between that and its indices.

    Indices that finding the block made lead nowhere yet; then it is the values that were added up, one after the other.
    """
    node: Any = block.result
    while isinstance(node, fx.Node) and (
        node is block.result or node.target in CARRIERS or node.target in _WRITES
    ):
        yield node
        node = next(iter(arguments(node)), None)
    starts = [block.indices, *block.indices.all_input_nodes]
    before = ancestors([block.result], since=min(starts))
    stack, seen = starts, set[fx.Node]()
    while stack:
        for user in stack.pop().users:
            if user in before and user not in seen:
                seen.add(user)
                stack.append(user)
    yield from seen


def _before(node: fx.Node, writes: set[fx.Node]) -> list[fx.Node]:
    """The writes that a write is added to, one after the other."""
    found = []
    while isinstance(node := arguments(node)[0], fx.Node) and (node in writes or node.target in CARRIERS):
        if node in writes:
            found.append(node)
    return found


def _products(write: fx.Node) -> list[_Product]:
    """The products of picked rows with weights in what a node writes."""
    picks: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in sorted(_slice(write)):
        if _picks(node):
            picks[node] = frozenset({node})
        else:
            picks[node] = frozenset().union(*(picks.get(each, ()) for each in node.all_input_nodes))
    found = []
    for node, rows in picks.items():
        if node.target in _PRODUCTS and rows:
            found += [
                _Product(weight, rows) for weight in map(_weight, node.all_input_nodes) if weight is not None
            ]
    return found


def _slice(write: fx.Node) -> set[fx.Node]:
    """What a write's rows are computed from, back to where they were picked."""
    stack = [node for node in write.all_input_nodes if node is not arguments(write)[0]]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if not _picks(node):
            new = [each for each in node.all_input_nodes if each not in seen and not is_size(each)]
            seen.update(new)
            stack += new
    return seen


def _picks(node: fx.Node) -> bool:
    """Whether a node takes rows that are chosen by the data: by their numbers, or so many of them."""
    if node.target in _PICKS:
        given = arguments(node)[1] if node.target is _aten.index.Tensor else arguments(node)[1:]
        return any(isinstance(each, fx.Node) and _is_chosen(each) for each in given)
    source = arguments(node)[0] if is_part(node) else node
    sized = source.target in (_aten.split_with_sizes.default, _aten.slice.Tensor, _aten.narrow.default)
    return sized and any(_is_unknown(each) for each in source.all_input_nodes)


def _is_unknown(size: fx.Node) -> bool:
    value = size.meta.get("val")
    return isinstance(value, torch.SymInt) and bool(free_unbacked_symbols(value))


def _weight(node: fx.Node) -> fx.Node | None:
    """The weight that an operand of a product is, or a stack of weights of which the data picks some."""
    while node.target in _ON_WEIGHTS:
        node = arguments(node)[0]
    if node.target in _PICKS and is_weight(arguments(node)[0]) and rank_of(arguments(node)[0]) >= _STACK_RANK:
        return node
    return node if is_weight(node) else None


def _are_several(products: Sequence[_Product]) -> bool:
    """Whether rows that were picked apart from each other go through weights of the same shape, or picked ones."""
    by_shape: dict[str, list[_Product]] = {}
    for product in products:
        if not is_weight(product.weight):
            return True
        by_shape.setdefault(str(shape_of(product.weight)), []).append(product)
    return any(
        first.weight is not other.weight and first.picks != other.picks
        for first, *others in by_shape.values()
        for other in others
    )


def _reason(chain: Sequence[fx.Node], way: Way, loops: Mapping[fx.Node, Loop]) -> str:
    by_experts = next((found for node in sorted(way.nodes) if (found := as_token_choice(node))), None)
    if by_experts is not None:
        return _chosen_by_experts(by_experts)
    mask = _where_to(chain[-1])
    if not way.known(loops) and mask is not None:
        return f"no choice among experts is seen that its rows come from, which {named(mask)} gives"
    return way.why(loops)


def _chosen_by_experts(choice: Choice) -> str:
    return f"its experts choose their tokens, by {named(choice.operator)}, and no token chooses its experts"


def _not_covered(graph: fx.Graph, blocks: Sequence[Experts]) -> tuple[Choice, ...]:
    """The choices that no block comes from, of experts among tokens, too."""
    choices = [
        choice for node in graph.nodes if (choice := as_choice(node) or as_token_choice(node)) is not None
    ]
    covered = ancestors(block.indices for block in blocks)
    return tuple(choice for choice in choices if choice.operator not in covered)


def _unrecognised(
    graph: fx.Graph, choices: Sequence[Choice], known: Meanings, taken: Collection[fx.Node | None]
) -> Iterator[tuple[fx.Node, Way, Choice]]:
    """Each group of experts of some choices.

    Args:
        graph: The traced program.
        choices: The choices that no block comes from.
        known: What axes mean.
        taken: Weights of blocks.

    Yields:
        The first value that their weights are used for, the values from the choice to where the two meet, a choice.
    """
    groups: dict[frozenset[Extent], list[Choice]] = {}
    for choice in choices:
        axes = known.axes(choice.scores)
        experts = (
            axes[-1] if choice.tokens is None else leaves(axes[: choice.tokens] + axes[choice.tokens + 1 :])
        )
        groups.setdefault(frozenset(experts), []).append(choice)
    for extents, group in groups.items():
        after = descendants(choice.operator for choice in group)
        made = [
            node
            for node in graph.nodes
            if node not in taken
            and (_is_of_all(node, known, extents) or _are_as_many(node, after, group[0].experts))
        ]
        below = descendants(made)
        own = after & _leading(graph, below) - {graph.output_node()}
        if not own.isdisjoint(below):
            users = [user for node in made for user in node.users]
            yield min(users), Way(frozenset(own), known), group[0]


def _is_of_all(node: fx.Node, known: Meanings, experts: Collection[Extent]) -> bool:
    """Whether a value is stacked weights of these experts, or what their modules computed, put together."""
    axes = known.axes(node)
    if is_weight(node):
        return rank_of(node) >= _STACK_RANK and not set(leaves(axes)).isdisjoint(experts)
    if node.target not in JOINS or not axes:
        return False
    along = axes[named_axis(node)]
    return not set(along).isdisjoint(experts) and _differ_in_weights(arguments(node)[0])


def _are_as_many(node: fx.Node, after: Collection[fx.Node], count: int) -> bool:
    """The same by their number, for what a choice led to: rows may stand in a buffer whose axes say nothing."""
    parts = arguments(node)[0] if node.target in JOINS else ()
    if node in after:
        return len(parts) == count and _differ_in_weights(parts)
    if not (is_weight(node) or (parts and all(map(is_weight, parts)))):
        return False
    users = set(node.users)
    users |= {each for user in users if user.target in _ON_WEIGHTS for each in user.users}
    is_used = any(user in after and user.target in _OF_STACKS for user in users)
    return is_used and rank_of(node) >= _STACK_RANK and shape_of(node)[0] == count


def _differ_in_weights(parts: Sequence[fx.Node]) -> bool:
    weights = [{each for each in ancestors([part]) if is_weight(each)} for part in parts[:2]]
    return len(parts) > 1 and weights[0] != weights[1]


def _leading(graph: fx.Graph, ends: set[fx.Node]) -> set[fx.Node]:
    """These nodes and everything that they depend on."""
    found = set(ends)
    for node in reversed(graph.nodes):
        if not found.isdisjoint(node.users):
            found.add(node)
    return found
