"""Why code that clearly dispatches to experts is no block: which value lost its meaning, at which line and operator.

Rows that the data picks go through the weights of several experts, alike but for these weights, and are added, or
written, to rows that the data picks. Where no block came of that, the choice is followed once more, up to the first
value of which it is not known what its axes run over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_export.export.axes.choice import CARRIERS, as_choice, is_part
from moe_export.export.axes.listing import Listing, listing_of
from moe_export.export.axes.one_hot import one_hot_mask_of
from moe_export.export.axes.shapes import arguments, rank_of, shape_of
from moe_export.export.axes.support import support_of
from moe_export.export.experts.body import Experts
from moe_export.export.experts.listed import region_of
from moe_export.export.experts.pairs import Loop, follow, region_from
from moe_export.export.frontend.source import line_of
from moe_export.export.gates.region import ancestors, is_size
from moe_export.export.tracing.weight_inputs import is_weight

_aten = torch.ops.aten

_WRITES: Mapping[Any, int] = {
    _aten.index_add.default: 2, _aten.index_put.default: 1, _aten.scatter_add.default: 2, _aten.index_copy.default: 2,
    _aten.scatter_reduce.two: 2, _aten.scatter.src: 2, _aten.masked_scatter.default: 1,
}  # fmt: skip
"""Operators that write rows; which argument says where."""
_CHOOSES = {
    _aten.nonzero.default, _aten.nonzero_numpy.default, _aten.where.default, _aten.argwhere.default,
    _aten.topk.default, _aten.argmax.default, _aten.max.dim, _aten.sort.default, _aten.sort.stable,
    _aten.argsort.default, _aten.argsort.stable, _aten.bucketize.Tensor,
}  # fmt: skip
_PICKS = {_aten.index.Tensor, _aten.index_select.default, _aten.masked_select.default, _aten.gather.default}
_PRODUCTS = {
    _aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default,
    _aten.convolution.default, _aten.conv2d.default, _aten.conv1d.default, _aten.einsum.default,
}  # fmt: skip
_ON_WEIGHTS = {_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten._to_copy.default}
_NO_VALUES = {_aten._assert_tensor_metadata.default, _aten._assert_scalar.default}
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
    graph: fx.Graph, blocks: Sequence[Experts], loops: Mapping[fx.Node, Loop]
) -> Iterator[tuple[str | None, str]]:
    """Each place where rows of several experts come together, and no block was found: its line, and why.

    Args:
        graph: The traced program.
        blocks: The blocks that were found.
        loops: Loops over experts that were understood by themselves.
    """
    writes = {node for node in graph.nodes if node.target in _WRITES and _is_chosen(_where_to(node))}
    if not writes:
        return
    taken = {node for block in blocks for node in _of_block(block)}
    seen = set[fx.Node]()
    for node in sorted(writes, reverse=True):
        if node in seen:
            continue
        chain = [node, *_before(node, writes)]
        seen.update(chain)
        if taken.isdisjoint(chain) and _are_several([each for one in chain for each in _products(one)]):
            yield line_of(node.meta.get("stack_trace")), _reason(chain, loops)


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
            if source not in seen and not is_size(source) and not _is_float(source):
                seen.add(source)
                stack.append(source)
    return False


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


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
    before = ancestors([block.result])
    stack, seen = [block.indices, *block.indices.all_input_nodes], set[fx.Node]()
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


def _reason(chain: Sequence[fx.Node], loops: Mapping[fx.Node, Loop]) -> str:
    before = _everything_before(chain)
    known = _known(before, loops)
    if not known:
        mask = _where_to(chain[-1])
        assert mask is not None
        return f"no choice among experts is seen that its rows come from, which {_named(mask)} gives"
    for node in sorted(before):
        lost = node not in known and node.target not in _NO_VALUES and not is_size(node)
        if lost and not known.isdisjoint(node.all_input_nodes):
            return f"it is not known of which tokens and experts the result of {_named(node)} is"
    return "its rows are not added up over the choices of a token"


def _everything_before(chain: Sequence[fx.Node]) -> set[fx.Node]:
    """What a chain of writes follows from, back to the choice that its row numbers come from."""
    stack, seen = list(chain), set(chain)
    while stack:
        node = stack.pop()
        if as_choice(node) is None and not is_weight(node):
            new = [each for each in node.all_input_nodes if each not in seen]
            seen.update(new)
            stack += new
    return seen


def _known(before: set[fx.Node], loops: Mapping[fx.Node, Loop]) -> set[fx.Node]:
    """The values that still say something about tokens and experts, by following each choice and each list."""
    known: set[fx.Node] = set()
    for node in before:
        if node.op != "call_function":
            continue
        choice, listing = as_choice(node), listing_of(node)
        if one_hot_mask_of(node) is not None:
            known.add(node)
        if choice is not None and choice.indices in before:
            region = region_from(choice.indices, choice.experts)
            follow(region, loops)
            known |= region.rows.keys()
        elif listing is not None and _is_of_choice(listing):
            region = region_of(node, listing)
            follow(region, loops)
            known |= region.rows.keys()
    return known


def _is_of_choice(listing: Listing) -> bool:
    """Whether a list is of chosen pairs, rather than of any entries of a mask."""
    return listing.entries is None or support_of(listing.entries.matrix) is not None


def _named(node: fx.Node) -> str:
    node = arguments(node)[0] if is_part(node) else node
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", None) or node.name
    line = line_of(node.meta.get("stack_trace"))
    return f"`{name}` at {line}" if line else f"`{name}`"
