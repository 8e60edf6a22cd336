"""Split a mask over tokens, experts and slots into terms, one for each choice of the tokens, and prove it sparse.

    mask[s, e, c] = sum over terms of  factor[s, e] * ... * [place[s, e] == c]

Each term is 0 except at one slot of the expert that the token chose. If no two terms and no two tokens share a slot of
an expert, the mask only passes rows to experts and back, and what an expert computes in a slot belongs to one pair of a
token and a choice. Letters and labels: `capacity_views`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.operators import BOTH, CASTS, EITHER, NONZERO
from moe_export.export.axes.shapes import argument, arguments, named_axis, shape_of
from moe_export.export.axes.support import constant_of
from moe_export.export.experts.capacity_facts import Choice, Facts, Number
from moe_export.export.experts.capacity_views import (
    Labels,
    View,
    marked,
    product_of,
    summed_over,
)
from moe_export.export.experts.notes import named
from moe_export.export.sizes import same_shape, same_size

_aten = torch.ops.aten
_KEEP_ZERO = {*NONZERO, _aten.neg.default}


class NotSparseError(RefusedError):
    """A mask is not known to be sparse, and is left as it was written."""


@dataclass(frozen=True)
class Step:
    """One step in computing a term's value, which starts as 1: a product, a quotient, or any one operator.

    Attributes:
        what: "times", "divided by" or "then".
        view: The other factor, without an axis over slots; for "then" the operator's result, without axes.
    """

    what: str
    view: View


@dataclass(frozen=True)
class Term:
    """One choice of every token.

    Attributes:
        steps: How its value is computed; they keep 0 at 0.
        place: The slot, a value without an axis over slots.
        slots: C, a number or the node that computes it.
    """

    steps: tuple[Step, ...]
    place: View
    slots: Any

    @property
    def factors(self) -> tuple[View, ...]:
        """The values that are not 0 where the term is not 0."""
        return tuple(step.view for step in self.steps if step.what == "times")


@dataclass(frozen=True)
class Proved:
    """A term, and what was proved about it.

    Attributes:
        term: The term.
        facts: The values that are not 0 where the term is not 0.
        choice: The expert that was chosen.
        number: Its slot.
        bounded: Whether the slot is known to be less than C.
    """

    term: Term
    facts: frozenset[View]
    choice: Choice
    number: Number
    bounded: bool


def terms_of(view: View, labels: Labels) -> list[Term]:
    """The terms of a mask.

    Args:
        view: (..., s, ..., e, ..., c, ...), in any order.
        labels: The labels of the block; gets the size of the axis over choices, if there is one.

    Raises:
        NotSparseError: It is not a sum of products with a slot.
    """
    view = labels.peeled(view, values=True)
    node, args = view.node, arguments(view.node)
    if node.op == "call_function":
        place = _place(view, labels)
        if place is not None:
            return [Term((), *place)]
        if node.target is _aten.slice.Tensor:
            return _first_slots(view, labels)
        if node.target in EITHER and not node.kwargs and _adds_masks(args):
            return [term for each in labels.operands(view) or [] for term in terms_of(each, labels)]
        if _keeps_zero(node):
            then = Step("then", View(node, ()))
            inner = terms_of(View(args[0], view.axes), labels)
            return [dataclasses.replace(term, steps=(*term.steps, then)) for term in inner]
        for factors in _factors(view, labels):
            return _times(factors, labels)
    raise NotSparseError(f"{named(node)} is not a sum of slots that were assigned to tokens")


def _first_slots(view: View, labels: Labels) -> list[Term]:
    """The terms of `mask[..., :C]`: those of the mask, of which a place from C on has no slot."""
    node, source = view.node, arguments(view.node)[0]
    start, end, step = (
        argument(node, place, name) for place, name in ((2, "start"), (3, "end"), (4, "step"))
    )
    if (
        view.axes[named_axis(node)] != ("c",)
        or start not in (None, 0)
        or step not in (None, 1)
        or end is None
    ):
        raise NotSparseError(f"{named(view.node)} takes other slots than the first")
    return [dataclasses.replace(term, slots=end) for term in terms_of(View(source, view.axes), labels)]


def _adds_masks(args: Sequence[Any]) -> bool:
    """Whether only masks are added; a 0, with which a loop begins, is allowed, too."""
    return len(args) == 2 and all(isinstance(each, fx.Node) or each == 0 for each in args)


def _keeps_zero(node: fx.Node) -> bool:
    """Whether an elementwise operator maps 0 to 0.

    Applied to a sum in which at most one term is not 0, it is the sum of what it gives for each term.
    """
    if node.target in CASTS:
        return node.meta["val"].dtype is torch.bool
    return node.target in _KEEP_ZERO and (len(arguments(node)) < 2 or arguments(node)[1] == 0)


def _factors(view: View, labels: Labels) -> Iterator[list[Step]]:
    """A value as a product, or a sum of products over the choices."""
    node, args = view.node, arguments(view.node)
    if node.target in BOTH:
        yield [Step("times", each) for each in labels.operands(view) or []]
    elif node.target is _aten.div.Tensor and isinstance(args[1], fx.Node):
        one, other = (labels.aligned(each, view) for each in args)
        yield [Step("times", one), Step("divided by", other)]
    elif node.target is _aten.einsum.default:
        for over in ("", "k"):
            parts = product_of(view, over)
            if parts is not None:
                _note_choices(parts, labels)
                yield [Step("times", part) for part in parts]
    elif node.target in (_aten.bmm.default, _aten.matmul.default) and _is_outer(args):
        yield [
            Step("times", View(args[0], (*view.axes[:-1], ()))),
            Step("times", View(args[1], (*view.axes[:-2], (), view.axes[-1]))),
        ]
    elif node.target is _aten.sum.dim_IntList and "k" not in view.labels:
        for each in summed_over(view, "k"):
            _note_choices([each], labels)
            yield [Step("times", each)]
    elif node.target is _aten.where.self and constant_of(args[2]) == 0:
        yield [Step("times", labels.aligned(each, view)) for each in args[:2]]


def _is_outer(args: Sequence[Any]) -> bool:
    """Whether a matrix product is one of (..., a, 1) and (..., 1, b), which sums nothing up."""
    one, other = shape_of(args[0]), shape_of(args[1])
    return len(one) == len(other) > 2 and same_size(one[-1], 1) and same_shape(one[:-2], other[:-2])


def _note_choices(parts: Sequence[View], labels: Labels) -> None:
    for part in parts:
        for axis, size in zip(part.axes, shape_of(part.node), strict=True):
            if axis == ("k",):
                labels.note("k", size)


def _times(steps: list[Step], labels: Labels) -> list[Term]:
    """The terms of the one factor that has slots, times the other factors."""
    with_slots = [step for step in steps if "c" in labels.peeled(step.view).labels]
    if len(with_slots) != 1 or with_slots[0].what != "times":
        raise NotSparseError("a product in which not exactly one factor has slots")
    others = tuple(step for step in steps if step is not with_slots[0])
    found = terms_of(with_slots[0].view, labels)
    return [dataclasses.replace(term, steps=(*term.steps, *others)) for term in found]


def _place(view: View, labels: Labels) -> tuple[View, Any] | None:
    """The place and C of `place[..., None] == arange(C)` or `one_hot(place, C)`; None for anything else."""
    found = marked(view, "c", labels)
    return found if found is not None and found[1] is not None else None


def proved(terms: Sequence[Term], facts: Facts) -> tuple[Proved, ...]:
    """Prove that no two tokens and no two terms share a slot.

    Raises:
        NotSparseError: It cannot be proved, and why.
    """
    found = tuple(_proved(term, facts) for term in terms)
    for place, one in enumerate(found):
        for other in found[:place]:
            if not (_below(one, other, facts) or _below(other, one, facts)):
                raise NotSparseError(
                    f"two choices may share a slot, which {named(one.term.place.node)} gives"
                )
    return found


def _proved(term: Term, facts: Facts) -> Proved:
    set_there: frozenset[View] = frozenset()
    for view in term.factors:
        set_there |= facts.set_where(view)
    set_there = facts.closed(set_there)
    choices = [known for mark in set_there if (known := facts.choice(mark)) is not None]
    several = _pairs_of(term)
    for choice in choices:
        number = facts.number(term.place, set_there)
        if number is None or len(number.counts) != 1:
            continue
        ((marks, over),) = number.counts
        if marks not in set_there or not facts.is_mask(marks) or not several <= over:
            raise NotSparseError(
                f"tokens may share a slot, as {named(term.place.node)} does not count those that chose the expert"
            )
        if number.constant < -1:
            raise NotSparseError(f"a slot may be negative, which {named(term.place.node)} gives")
        return Proved(term, set_there, choice, number, _bounded(number, set_there, facts))
    where = (
        f"the slot that {named(term.place.node)} gives is not a count of the tokens before"
        if choices
        else f"it is not known which experts were chosen where {named(term.place.node)} gives the slot"
    )
    raise NotSparseError(where)


def _pairs_of(term: Term) -> frozenset[str]:
    """The labels that a term's pairs run over: tokens, and choices if they have an axis."""
    labels = set(term.place.labels).union(*(view.labels for view in term.factors))
    return frozenset({"s"} | (labels & {"k"}))


def _bounded(number: Number, set_there: frozenset[View], facts: Facts) -> bool:
    """Whether one of the facts compares the slot with the number of slots."""
    return any(
        same_size(limit, facts.labels.sizes["c"]) for limit in facts.limits(number, set_there, set_there)
    )


def _below(one: Proved, other: Proved, facts: Facts) -> bool:
    """Whether every slot of `one` is below every slot of `other` at the same expert.

    Apart from the constant, a slot of `one` is at most its totals plus the number of its marks, and a slot of `other`
    is more than its totals.
    """
    if one.number.constant != other.number.constant:
        return False
    more = Counter(other.number.totals) - Counter(one.number.totals)
    if Counter(one.number.totals) - Counter(other.number.totals):
        return False
    return any(_counts_at_most(one, total, facts) for total in more)


def _counts_at_most(one: Proved, total: View, facts: Facts) -> bool:
    """Whether a total of marks is at least the count at any mark of `one`.

    It is if the total is over all marks that are counted, or over those that fit into the expert's slots, which are the
    first ones.
    """
    ((marks, _),) = one.number.counts
    if total not in one.facts:
        return False
    if total == marks:
        return True
    if total.node.target not in BOTH:
        return False
    operands = [facts.labels.peeled(each) for each in facts.labels.operands(total) or []]
    rest = [each for each in operands if each != marks]
    return len(operands) == 2 and len(rest) == 1 and _is_first(one, rest[0], facts)


def _is_first(one: Proved, compared: View, facts: Facts) -> bool:
    """Whether a comparison holds exactly for the first marks of each expert: those whose slot is below a limit."""
    marks = one.number.counts[0][0]
    return any(True for _ in facts.limits(one.number, [compared], frozenset({compared, marks})))
