"""What is known of the values of a mask: which are 0 or 1, which mark the chosen expert, which count the marks.

A capacity gives every chosen token a slot of its expert: the number of tokens that chose the expert before it. That no
two tokens share a slot is read off how the number was computed: as a running count of marks (the ones of a one-hot
mask M),

    count(M)[s, e] = how many s' <= s have M[s', e] = 1

whose values at the marked tokens of an expert are 1, 2, 3, ..., plus totals of other marks, which are the same for
all tokens. Letters and labels: `capacity_views`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.operators import BOTH, NONZERO
from moe_export.export.axes.shapes import argument, arguments, named_axes, named_axis, shape_of
from moe_export.export.axes.support import constant_of
from moe_export.export.experts.capacity_views import (
    Labels,
    View,
    marked,
    product_of,
    summed_over,
    with_axis,
)
from moe_export.export.sizes import is_at_most, same_size

_aten = torch.ops.aten
_WHERE = {_aten.where.self, _aten.where.ScalarOther}
_SUMS = {_aten.sum.dim_IntList, _aten.amax.default, _aten.any.dim}


@dataclass(frozen=True)
class Choice:
    """A value that is 0 except at chosen experts.

    Attributes:
        indices: The chosen experts, their axes labelled; with an axis "k" if the marks are of several choices.
        several: Whether a token may have several marks.
    """

    indices: View
    several: bool


@dataclass(frozen=True)
class Number:
    """A whole number where some facts hold: a constant, plus running counts of marks, plus totals of marks.

    Attributes:
        constant: The constant.
        counts: The marks of each running count, and the labels that it runs over.
        totals: The marks of each total over all tokens.
    """

    constant: int = 0
    counts: tuple[tuple[View, frozenset[str]], ...] = ()
    totals: tuple[View, ...] = ()

    def plus(self, other: Number, sign: int = 1) -> Number | None:
        """The sum, or with `sign` -1 the difference; None if a count or total would be subtracted."""
        if sign < 0 and (other.counts or other.totals):
            return None
        return Number(
            self.constant + sign * other.constant, self.counts + other.counts, self.totals + other.totals
        )


class Facts:
    """What can be proved about the values of one block's masks. A fact is a value that is not 0.

    Args:
        labels: The labels of the block.
    """

    def __init__(self, labels: Labels) -> None:
        self.labels = labels

    def set_where(self, view: View) -> frozenset[View]:
        """The values that are not 0 wherever this one is not 0, itself included."""
        view = self.labels.peeled(view)
        found = {view}
        for operand in self._kept_by(view):
            found |= self.set_where(operand)
        return frozenset(found)

    def closed(self, facts: frozenset[View]) -> frozenset[View]:
        """Facts and what follows from sums over the experts: if one is not 0, nor is the chosen expert's term."""
        found = facts
        for view in facts:
            if view.node.target not in _SUMS or view.node.op != "call_function":
                continue
            for source in summed_over(view, "e"):
                marks = self.set_where(source)
                if any(
                    (known := self.choice(mark)) is not None and not known.several for mark in marks & facts
                ):
                    found |= marks
        return found if found == facts else self.closed(found)

    def _kept_by(self, view: View) -> list[View]:
        """The inputs of a value's operator that are not 0 wherever the value is not 0."""
        node, args = view.node, arguments(view.node)
        target: Any = node.target
        if target in BOTH:
            return self.labels.operands(view) or []
        if target is _aten.einsum.default:
            return product_of(view) or []
        one = {_aten.eq.Scalar: 1, _aten.ge.Scalar: 1}.get(target)
        if (target in NONZERO and args[1] == 0) or (one is not None and args[1] == one):
            source = View(args[0], view.axes)
            return [source] if one is None or self.is_mask(source) else []
        kept: tuple[Any, ...] = ()
        if target is _aten.div.Tensor or (target is _aten.masked_fill.Scalar and args[2] == 0):
            kept = args[:1]
        elif target in _WHERE and constant_of(args[2]) == 0:
            kept = args[:2]
        return [self.labels.aligned(each, view) for each in kept if isinstance(each, fx.Node)]

    def is_mask(self, view: View) -> bool:
        """Whether every value is 0 or 1."""
        view = self.labels.peeled(view)
        node = view.node
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype is torch.bool:
            return True
        if node.op != "call_function":
            return False
        if node.target is _aten.one_hot.default or self.choice(view):
            return True
        if node.target in BOTH:
            return all(self.is_mask(each) for each in self.labels.operands(view) or [View(node, ())])
        if node.target is _aten.einsum.default:
            parts = product_of(view)
            return parts is not None and all(self.is_mask(part) for part in parts)
        return False

    def choice(self, view: View) -> Choice | None:
        """What a value marks, if it is a one-hot mask of experts, or such masks added up over choices; else None."""
        view = self.labels.peeled(view)
        node = view.node
        if node.op != "call_function":
            return None
        if node.target in _SUMS:
            return self._several(view)
        found = marked(view, "e", self.labels, several="k")
        if found is None:
            return None
        chosen, _ = found
        return self._distinct(chosen) if "k" in chosen.labels - view.labels else Choice(chosen, False)

    def _several(self, view: View) -> Choice | None:
        """One-hot masks (N, k, E) added up over the choices."""
        if "k" in view.labels:
            return None
        for source in summed_over(view, "k"):
            inner = self.choice(source)
            if inner is not None and not inner.several and "k" in inner.indices.labels:
                return self._distinct(inner.indices)
        return None

    def _distinct(self, chosen: View) -> Choice | None:
        """Marks of several choices of a token, which have to come from `topk`, so that the experts differ."""
        found = self.labels.peeled(chosen)
        places = [place for place, axis in enumerate(found.axes) if axis == ("k",)]
        return Choice(found, True) if len(places) == 1 and places[0] == _topk_axis(found.node) else None

    def number(self, view: View, facts: frozenset[View]) -> Number | None:
        """What a value is where all facts are not 0, as a whole number; None if that is not known."""
        view = self.labels.peeled(view)
        if view in facts and self.is_mask(view):
            return Number(1)
        rule = _NUMBERS.get(view.node.target)
        if rule is not None:
            return rule(self, view, facts)
        return self._total(view) or self._at_choice(view, facts)

    def _running(self, view: View, facts: frozenset[View]) -> Number | None:
        """`cumsum` of marks."""
        over = view.axes[named_axis(view.node)]
        marks = self.labels.peeled(View(arguments(view.node)[0], view.axes))
        return Number(counts=((marks, frozenset(over)),)) if over else None

    def _where(self, view: View, facts: frozenset[View]) -> Number | None:
        condition, value = (self.labels.aligned(each, view) for each in arguments(view.node)[:2])
        return self.number(value, facts) if self.labels.peeled(condition) in facts else None

    def _sum(self, view: View, facts: frozenset[View]) -> Number | None:
        found: list[Number] = []
        if view.node.kwargs:
            return None
        for each in arguments(view.node)[:2]:
            if isinstance(each, fx.Node) and isinstance(each.meta.get("val"), torch.Tensor):
                known = self.number(self.labels.aligned(each, view), facts)
            else:
                known = Number(int(each)) if isinstance(each, (int, float)) and each == int(each) else None
            if known is None:
                return None
            found.append(known)
        return found[0].plus(found[1], -1 if view.node.target is _aten.sub.Tensor else 1)

    def _product(self, view: View, facts: frozenset[View]) -> Number | None:
        """A product in which all factors but one are known to be 1."""
        is_einsum = view.node.target is _aten.einsum.default
        parts = product_of(view) if is_einsum else self.labels.operands(view)
        if parts is None:
            return self._at_choice(view, facts) if is_einsum else None
        if not is_einsum and len(parts) != 2:
            return None
        known = [self.number(part, facts) for part in parts]
        rest = [each for each in known if each != Number(1)]
        return rest[0] if len(rest) == 1 else (Number(1) if not rest else None)

    def limits(
        self, number: Number, compared: Iterable[View], facts: frozenset[View], before: fx.Node | None = None
    ) -> Iterator[Any]:
        """What a number is less than by some comparisons, where the facts hold; the same for all tokens.

        Args:
            number: The number.
            compared: The comparisons.
            facts: The facts.
            before: Only comparisons of values that are computed before this node.
        """
        for view in compared:
            args = arguments(view.node)
            if view.node.target not in (_aten.lt.Scalar, _aten.le.Scalar) or not (
                before is None or args[0] < before
            ):
                continue
            limit: Any = args[1].meta.get("val") if isinstance(args[1], fx.Node) else args[1]
            known = self.number(self.labels.aligned(args[0], view), facts)
            if known is not None and (known.counts, known.totals) == (number.counts, number.totals):
                yield limit + number.constant - known.constant + (view.node.target is _aten.le.Scalar)

    def _clamped(self, view: View, facts: frozenset[View]) -> Number | None:
        """`clamp` of a number that is not negative, and below its limit by one of the facts: the number itself."""
        node = view.node
        least, most = (argument(node, place, name) for place, name in ((1, "min"), (2, "max")))
        known = self.number(View(arguments(node)[0], view.axes), facts)
        if known is None or least not in (0, None) or not is_not_negative(known):
            return None
        if most is None:
            return known
        most = most.meta["val"] if isinstance(most, fx.Node) else most
        within = any(is_at_most(limit, most + 1) for limit in self.limits(known, facts, facts, before=node))
        return known if within else None

    def _gathered(self, view: View, facts: frozenset[View]) -> Number | None:
        """`gather(P, 1, idx)`: P at the chosen expert."""
        source, _, index = arguments(view.node)[:3]
        chosen = self.labels.peeled(View(index, view.axes))
        if not any(
            known is not None and known.indices == chosen and not known.several
            for known in map(self.choice, facts)
        ):
            return None
        at_all = with_axis(view.axes, named_axis(view.node), ("e",), instead=True)
        return self.number(View(source, at_all), facts)

    def _before(self, view: View, facts: frozenset[View]) -> Number | None:
        """`pad(M, (1, 0)).cumsum()[:-1]`: the marks before a token, one less than up to it if it is marked itself."""
        running, (axis,) = arguments(view.node)[0], named_axes(view.node)
        padded = arguments(running)[0] if running.target is _aten.cumsum.default else None
        if padded is None or padded.target not in (_aten.constant_pad_nd.default, _aten.pad.default):
            return None
        marks, pads, *value = [each for each in arguments(padded) if each != "constant"]
        wanted = [0, 0] * (len(view.axes) - axis - 1) + [1, 0]
        begins = (*arguments(view.node), 0, 0)[2] in (0, None) and len(arguments(view.node)) < 5
        along = named_axes(running) == (axis,)
        same = same_size(shape_of(view.node)[axis], shape_of(marks)[axis])
        if list(pads) != wanted or (value and value[0]) or not (begins and along and same):
            return None
        over = view.axes[axis]
        before = self.labels.peeled(View(marks, view.axes))
        return Number(-1, ((before, frozenset(over)),)) if over else None

    def _total(self, view: View) -> Number | None:
        """Marks added up over all tokens."""
        if view.node.target is not _aten.sum.dim_IntList or {"s", "k"} & view.labels:
            return None
        for source in summed_over(view, "s"):
            marks = self.labels.peeled(source)
            if self.is_mask(marks):
                return Number(totals=(marks,))
        return None

    def _at_choice(self, view: View, facts: frozenset[View]) -> Number | None:
        """A sum over the experts in which only the chosen expert's term is not 0."""
        if view.node.target is _aten.einsum.default:
            summed = [product_of(view, over="e") or []]
        elif view.node.target in (_aten.sum.dim_IntList, _aten.amax.default):
            summed = [[each] for each in summed_over(view, "e")]
        else:
            return None
        for parts in summed:
            marks = frozenset().union(*(self.set_where(part) for part in parts))
            single = any(
                (known := self.choice(mark)) is not None and not known.several for mark in marks & facts
            )
            if not parts or not single:
                continue
            known_parts = [self.number(part, facts) for part in parts]
            rest = [each for each in known_parts if each != Number(1)]
            found = rest[0] if len(rest) == 1 else None
            if found is not None and (view.node.target is not _aten.amax.default or is_not_negative(found)):
                return found
        return None


_NUMBERS: dict[Any, Callable[[Facts, View, frozenset[View]], Number | None]] = {
    _aten.add.Tensor: Facts._sum,
    _aten.sub.Tensor: Facts._sum,
    **dict.fromkeys(BOTH, Facts._product),
    _aten.einsum.default: Facts._product,
    _aten.cumsum.default: Facts._running,
    **dict.fromkeys(_WHERE, Facts._where),
    **dict.fromkeys((_aten.clamp.default, _aten.clamp_min.default, _aten.relu.default), Facts._clamped),
    _aten.gather.default: Facts._gathered,
    _aten.slice.Tensor: Facts._before,
}


def _topk_axis(node: fx.Node) -> int | None:
    """The axis of the choices, if a value is the indices of a `topk`; else None."""
    source = arguments(node)[0] if node.target is operator.getitem else None
    if source is None or source.target is not _aten.topk.default or arguments(node)[1] != 1:
        return None
    return named_axis(source)


def is_not_negative(number: Number) -> bool:
    """Whether a number is 0 or more at a marked token, whose own mark makes each running count at least 1."""
    return number.constant + len(number.counts) >= 0
