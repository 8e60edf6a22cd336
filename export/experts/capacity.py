"""MoE blocks that hand tokens to experts through masks with a capacity: GShard's dispatch and combine.

    dispatched = einsum("sec,sm->ecm", dispatch, x)        every expert has C slots, filled with rows of tokens
    out        = einsum("sec,ecm->sm", combine, experts(dispatched))

As products these cost N * E * C * M, quadratic in N. Where the masks are proved to be sparse (`capacity_terms`: a
token has at most k slots, and no two tokens share one), what the slots of an expert hold are rows of x, and

    out[n] = sum over the choices j of combine[n, e_j, slot_j] * expert e_j(dispatch[n, e_j, slot_j] * x[n])

which is the usual block, with weights and indices (N, k). A token that found its expert full has the index -1, which
no expert takes, and so has one whose weight is 0. Not the same where a row of x is not finite: in a product, 0 times
that row reaches all slots. Masks that are not sparse (Soft MoE) and masks of which it cannot be proved stay.

Letters: N tokens (s), E experts (e), C slots (c), M features (m), k choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.analysis import meanings_of
from moe_export.export.axes.extents import Axis as MeantAxis
from moe_export.export.axes.letters import Letters, products
from moe_export.export.axes.meaning import Meanings
from moe_export.export.axes.operators import CASTS, JOINS, TURNS, VIEWS
from moe_export.export.axes.shapes import arguments, named_axis, shape_of
from moe_export.export.experts.body import Experts
from moe_export.export.experts.canonical import value_numbering
from moe_export.export.experts.capacity_facts import Facts
from moe_export.export.experts.capacity_pairs import PairWriter
from moe_export.export.experts.capacity_terms import NotSparseError, Proved, Term, proved, terms_of
from moe_export.export.experts.capacity_views import Axis, Labels, View
from moe_export.export.experts.derived import masked_indices_among
from moe_export.export.experts.notes import Notes, named
from moe_export.export.experts.one_expert import OneExpert, Scope
from moe_export.export.experts.trial import check
from moe_export.export.frontend.source import line_of
from moe_export.export.sizes import fixed, same_shape, same_size

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Masks:
    """A combination whose mask was taken apart.

    Attributes:
        end: The product; its first operand is the mask.
        terms: Of the mask.
        outputs: What the experts give, (e, g, c, h) in any order.
        labels: Of the block.
    """

    end: Letters
    terms: list[Term]
    outputs: View
    labels: Labels


def find_capacity(graph: fx.Graph, notes: Notes) -> Iterator[Experts]:
    """Every block that dispatches through masks.

    Args:
        graph: The traced program; values of pairs are written into it.
        notes: Gets a line for each block that stays as it was written.
    """
    value_numbers: Mapping[fx.Node, fx.Node] | None = None
    known: Meanings | None = None
    for node in list(graph.nodes):
        for end in products(node):
            if len(end.only(0)) != 1 or len(end.only(1)) != 1 or not 1 <= len(end.shared(kept=False)) <= 2:
                continue
            value_numbers = value_numbers or value_numbering(graph)
            why: Exception | None = None
            for masks in _masks(end, value_numbers):
                known = known or meanings_of(graph)
                try:
                    yield _understood(masks, known)
                except RefusedError as error:
                    why = why or error
                else:
                    break
            else:
                if why is not None:
                    notes.stay_products(line_of(node.meta.get("stack_trace")), str(why))


def _masks(end: Letters, value_numbers: Mapping[fx.Node, fx.Node]) -> Iterator[_Masks]:
    """The mask of a combination, in each way to read its axes; none if the first operand is none."""
    groups = {letter: f"g{place}" for place, letter in enumerate(end.shared(kept=True))}
    for names, merged in _readings(end, end.operands[0]):
        sizes = dict(merged)
        named: dict[str, Axis] = {letter: (label,) for letter, label in groups.items()}
        named |= names
        named |= {end.only(0)[0]: ("s",), end.only(1)[0]: ("h",)}
        views = [
            View(node, tuple(named[letter] for letter in letters))
            for node, letters in zip(end.operands, end.terms, strict=True)
        ]
        for view in views:
            sizes |= {
                axis[0]: size
                for axis, size in zip(view.axes, shape_of(view.node), strict=True)
                if len(axis) == 1
            }
        labels = Labels(sizes, value_numbers)
        if fixed(sizes["e"]) is None or fixed(sizes["h"]) is None:
            continue
        try:
            terms = terms_of(views[0], labels)
        except NotSparseError:
            continue
        yield _Masks(end, terms, views[1], labels)


def _readings(end: Letters, mask: fx.Node) -> Iterator[tuple[dict[str, Axis], dict[str, Any]]]:
    """Which of the summed letters may be experts and slots; or both, where a reshape merged them."""
    letters = end.shared(kept=False)
    if len(letters) == 2:
        for one, other in permutations(letters):
            yield {one: ("e",), other: ("c",)}, {}
        return
    place = end.terms[0].index(letters[0])
    merged = shape_of(mask)[place]
    source = arguments(mask)[0] if mask.args else None
    while isinstance(source, fx.Node):
        sizes: tuple[Any, ...] = shape_of(source)
        for axis in range(len(sizes) - 1):
            ones = any(same_size(size, 1) for size in sizes[axis : axis + 2])
            if not ones and same_size(sizes[axis] * sizes[axis + 1], merged):
                yield {letters[0]: ("e", "c")}, {"e": sizes[axis], "c": sizes[axis + 1]}
                yield {letters[0]: ("c", "e")}, {"c": sizes[axis], "e": sizes[axis + 1]}
                return
        source = arguments(source)[0] if source.args and source.target in CASTS | TURNS | VIEWS else None


def _understood(masks: _Masks, known: Meanings) -> Experts:
    labels, end = masks.labels, masks.end.node
    facts = Facts(labels)
    pairs = proved(masks.terms, facts)
    slots, tokens, given = _dispatch(masks, facts, pairs)
    one = _one_expert(slots, masks, known)
    check(one, {})
    builder = PairWriter(end, labels)
    weights = builder.flat([_spread(builder, pair) for pair in pairs])
    chosen = builder.flat([builder.indices(pair) for pair in pairs])
    indices = masked_indices_among(chosen, builder.call(_aten.ne.Scalar, weights, 0))
    taken = None if given is None else builder.flat([_spread(builder, pair) for pair in given])
    rows = {slots.node: builder.tokens(tokens)}
    return Experts(
        indices=indices,
        count=int(labels.sizes["e"]),
        body=one.module(rows, (taken, weights)),
        shared=tuple(rows.get(node, node) for node in (*one.outside, taken, weights) if node is not None),
        weights=one.weights,
        start=None,
        result=_result(masks, tokens),
        line=line_of(end.meta.get("stack_trace")),
    )


def _one_expert(slots: View, masks: _Masks, known: Meanings) -> OneExpert:
    """What one expert computes from the rows in its slots."""
    outputs, labels = masks.outputs, masks.labels
    given, found = (_by_label(view, labels, known) for view in (slots, outputs))
    for label in given.keys() & found.keys():
        known.extents.match(given[label], found[label], outputs.node)
    groups = sorted(label for label in given if label.startswith("g"))
    rows = tuple(extent for label in (*groups, "c") for extent in known.extents.of(given[label]))
    scope = Scope(
        known, rows, known.extents.of(given["e"]), int(labels.sizes["e"]), labels.value_numbers, slots.node
    )
    joined = labels.peeled(outputs)
    if joined.node.target in JOINS:
        parts = arguments(joined.node)[0]
        if joined.axes[named_axis(joined.node)] == ("e",) and len(parts) == scope.count:
            return OneExpert(parts, scope)
    return OneExpert([outputs.node], scope)


def _by_label(view: View, labels: Labels, known: Meanings) -> dict[str, MeantAxis]:
    """What each label of a value runs over."""
    flat = [label for axis in view.axes for label in axis]
    sizes = [labels.sizes[label] for label in flat]
    return dict(zip(flat, known.extents.reshaped(known.axes(view.node), sizes, view.node), strict=True))


def _spread(builder: PairWriter, pair: Proved) -> fx.Node:
    """(g, s, k): the value of each pair, in full size."""
    value, indices = builder.value(pair), builder.indices(pair)
    if same_shape(shape_of(value), shape_of(indices)):
        return value
    ones = builder.call(_aten.ones_like.default, indices, dtype=builder.dtype)
    return builder.call(_aten.mul.Tensor, value, ones)


def _dispatch(
    masks: _Masks, facts: Facts, pairs: Sequence[Proved]
) -> tuple[View, View, tuple[Proved, ...] | None]:
    """Where the tokens are handed to the experts.

    Returns:
        The rows in their slots; the tokens (g, s, m); what the mask holds for each pair, None where that is 1 for all
        that the combination takes.
    """
    why = "it was not found where the tokens are handed to the experts"
    stack, seen = [masks.outputs.node], {masks.outputs.node}
    while stack:
        node = stack.pop(0)
        for given in products(node):
            if len(given.shared(kept=False)) == 1 and len(given.only(1)) == 1:
                for slots, tokens, mask in _dispatched(masks, given):
                    try:
                        terms = terms_of(mask, masks.labels)
                    except NotSparseError:
                        continue
                    try:
                        values = _lined_up(proved(terms, facts), pairs)
                    except NotSparseError as error:
                        why = str(error)
                        continue
                    masks.labels.note("m", shape_of(tokens.node)[tokens.axes.index(("m",))])
                    return slots, tokens, None if _is_one(values, pairs, facts) else values
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    raise NotSparseError(why)


def _dispatched(masks: _Masks, given: Letters) -> Iterator[tuple[View, View, View]]:
    """A product read as a dispatch: its result, the tokens, and the mask."""
    sizes = masks.labels.sizes
    letters = given.only(0)
    groups = sorted(label for label in sizes if label.startswith("g"))
    known = given.shared(kept=True)
    readings: list[dict[str, Axis]] = []
    if len(letters) == 1:
        readings = [{letters[0]: ("e", "c")}, {letters[0]: ("c", "e")}]
    elif len(letters) == 2:
        readings = [{a: ("e",), b: ("c",)} for a, b in permutations(letters)]
    if len(known) != len(groups):
        return
    for order in permutations(groups):
        for reading in readings:
            named: dict[str, Axis] = {letter: (label,) for letter, label in zip(known, order, strict=True)}
            named |= reading | {given.shared(kept=False)[0]: ("s",), given.only(1)[0]: ("m",)}
            views = [
                View(node, tuple(named[letter] for letter in text))
                for node, text in zip(
                    (given.node, given.operands[1], given.operands[0]),
                    (given.out, given.terms[1], given.terms[0]),
                    strict=True,
                )
            ]
            if all(_fits(view, sizes) for view in views):
                yield views[0], views[1], views[2]


def _fits(view: View, sizes: Mapping[str, Any]) -> bool:
    for axis, size in zip(view.axes, shape_of(view.node), strict=True):
        product: Any = 1
        for label in axis:
            product = product * sizes.get(label, size)
        if not same_size(product, size):
            return False
    return True


def _lined_up(given: Sequence[Proved], pairs: Sequence[Proved]) -> tuple[Proved, ...]:
    """The terms of the dispatch in the order of those of the combination."""
    by_slot = {(term.choice, term.number): term for term in given}
    wanted = [(pair.choice, pair.number) for pair in pairs]
    if len(given) != len(pairs) or set(by_slot) != set(wanted):
        raise NotSparseError("tokens are handed to other slots than they are taken from")
    return tuple(by_slot[key] for key in wanted)


def _is_one(given: Sequence[Proved], pairs: Sequence[Proved], facts: Facts) -> bool:
    """Whether the dispatch holds 1 wherever the combination holds anything but 0."""
    for one, pair in zip(given, pairs, strict=True):
        last = one.term.steps[-1:] and one.term.steps[-1].view.node
        marks = (
            one.term.steps[:-1] == pair.term.steps
            and one.term.steps[-1].what == "then"
            and isinstance(last, fx.Node)
            and last.meta["val"].dtype is torch.bool
            and last.target is not _aten.gt.Scalar
        )
        steps = one.term.steps
        masks = all(
            step.what == "times" and facts.is_mask(step.view) and facts.labels.peeled(step.view) in pair.facts
            for step in steps
        )
        if not marks and not masks:
            return False
    return True


def _result(masks: _Masks, tokens: View) -> fx.Node:
    """(N, H), where the combination ends; groups of tokens are merged for it and taken apart again behind."""
    end, node = masks.end, masks.end.node
    order = [*end.shared(kept=True), end.only(0)[0], end.only(1)[0]]
    if list(end.out) != order:
        raise NotSparseError(f"the result of {named(node)} is not in the order of its tokens")
    if len(order) == 2:
        return node
    graph = node.graph
    width = int(masks.labels.sizes["h"])
    lead = [f"g{place}" for place in range(len(order) - 2)] + ["s"]
    sizes: list[Any] = []
    with graph.inserting_before(node):
        combined = graph.node_copy(node)
        flat = graph.call_function(_aten.reshape.default, (combined, [-1, width]))
        flat.meta = {**node.meta, "val": node.meta["val"].reshape([-1, width])}
        for label in lead:
            size = masks.labels.sizes[label]
            if isinstance(size, torch.SymInt):
                sizes.append(
                    graph.call_function(_aten.sym_size.int, (tokens.node, tokens.axes.index((label,))))
                )
                sizes[-1].meta = {**node.meta, "val": size}
            else:
                sizes.append(int(size))
    # The node stays the one that the program knows by its name: it may be an output.
    node.target, node.args = _aten.view.default, (flat, [*sizes, width])
    return flat
