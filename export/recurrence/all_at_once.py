"""The iterations of a loop that carries nothing, computed together: every value has an axis of iterations in front.

    for n in range(N): ys[n] = f(x[n], w)      ─▶      ys = f(x, w), with x (N, ...) and for each of its N rows

Operators that compute each row by itself do so for all of them; a rule says with which axes. A body with another
operator stays a loop.

Letters: N iterations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moe_export.export.axes.operators import ADDS_AN_AXIS, ALONG, CASTS, NORMS, VIEWS
from moe_export.export.axes.shapes import with_one_lead
from moe_export.export.gates.region import descendants
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.torch_compat.operators import Effect, effect_of

_aten = torch.ops.aten


class NotAlikeError(Exception):
    """An operator of a body has no rule, or none for these operands."""


@dataclass(frozen=True)
class Rows:
    """A value of all iterations, (N, ...)."""

    value: Tensor

    @property
    def rank(self) -> int:
        """How many axes the value of one iteration has."""
        return self.value.dim() - 1

    def aligned(self, rank: int) -> Tensor:
        """The value with axes of size 1 behind the first, so that each row has as many as that."""
        value = self.value
        for _ in range(rank - self.rank):
            value = value.unsqueeze(1)
        return value


class AllAtOnce(fx.Interpreter):
    """Runs a body once for all iterations: inputs that are `Rows` differ between them, others do not.

    Raises:
        NotAlikeError: From `run`.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _NO_VALUES:
            return None
        if not any(isinstance(each, Rows) for each in pytree.tree_leaves((args, kwargs))):
            return super().call_function(target, args, kwargs)
        rule = _rule_of(target)
        if rule is None:
            raise NotAlikeError(str(target))
        found = rule(target, args, kwargs)
        return tuple(map(Rows, found)) if isinstance(found, (tuple, list)) else Rows(found)


def goes_at_once(graph: fx.Graph, elements: int) -> bool:
    """Whether the iterations of a body are computed together: all its operators have rules, and it is worth it.

    It is where a body takes one of several results by a number of the iteration's own: a loop would compute all of them
    again each time; together they are products of many rows, and show which experts a token chose. And where a body
    computes nothing at all.

    Args:
        graph: A body without states.
        elements: How many of its first inputs differ between iterations.
    """
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target not in _NO_VALUES]
    if not all(_rule_of(node.target) for node in calls):
        return False
    own = descendants(graph.find_nodes(op="placeholder")[:elements])
    lookups = [node for node in calls if node.target is _aten.index_select.default and node.args[2] in own]
    if not lookups:
        return all(node.target in _MOVES for node in calls)
    return all(node.args[0] in own for node in lookups) and any(map(_is_of_several, lookups))


def _is_of_several(lookup: fx.Node) -> bool:
    source = lookup.args[0]
    return isinstance(source, fx.Node) and source.target is _aten.stack.default


Rule = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]


def _rule_of(target: Any) -> Rule | None:
    if target in _RULES:
        return _RULES[target]
    tags = getattr(target, "tags", ())
    if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
        return None
    return _pointwise if effect_of(target) not in (Effect.WRITES, Effect.UNKNOWN) else None


def _rows(value: Any) -> Rows:
    if not isinstance(value, Rows):
        raise NotAlikeError("an operand is the same for all iterations")
    return value


def _pointwise(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    rank = max(
        each.rank if isinstance(each, Rows) else each.dim()
        for each in leaves
        if isinstance(each, (Rows, Tensor))
    )

    def aligned(value: Any) -> Any:
        return value.aligned(rank) if isinstance(value, Rows) else value

    args, kwargs = pytree.tree_map(aligned, (tuple(args), dict(kwargs)))
    return target(*args, **kwargs)


def _same(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operator whose axes, if it has any, are the last ones, with weights that are the same for all iterations."""
    first, *others = args
    if any(isinstance(each, Rows) for each in pytree.tree_leaves((others, dict(kwargs)))):
        raise NotAlikeError(f"{target} of several values of an iteration")
    return target(_rows(first).value, *others, **kwargs)


def _along(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operator along the axes that it names: they are one further."""
    parts = list(args[0]) if isinstance(args[0], (list, tuple)) else [args[0]]
    if not all(isinstance(each, Rows) for each in parts):
        raise NotAlikeError(f"{target} of values that are the same for all iterations")
    moved = with_one_lead(target, args, kwargs, parts[0].rank + (target in ADDS_AN_AXIS), 0)
    if moved is None:
        raise NotAlikeError(f"{target} along all axes")
    (source, *others), named = moved
    values = [each.value for each in parts]
    return target(values if isinstance(source, (list, tuple)) else values[0], *others, **named)


def _viewed(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A reshape of each row."""
    value, sizes = _rows(args[0]).value, list(args[1])
    return value if sizes == list(value.shape[1:]) else value.reshape([value.shape[0], *sizes])


def _expanded(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    rows, sizes = _rows(args[0]), args[1]
    return rows.aligned(len(sizes)).expand([-1, *sizes])


def _looked_up(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`index_select` of numbers that each iteration has (N, m): of its own value, or of one that all share."""
    source, axis, numbers = args
    if not isinstance(numbers, Rows):
        return _along(target, args, kwargs)
    if not isinstance(source, Rows):
        raise NotAlikeError(f"{target} of a value that all iterations share")
    value, axis = source.value, axis % source.rank + 1
    place = numbers.value
    for n in range(1, value.dim()):
        if n != axis:
            place = place.unsqueeze(n)
    sizes = [-1 if n in (0, axis) else value.shape[n] for n in range(value.dim())]
    return value.gather(axis, place.expand(sizes))


_MOVES = {
    *CASTS, *VIEWS, _aten.select.int, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.slice.Tensor,
    _aten.transpose.int, _aten.permute.default,
}  # fmt: skip
"""Operators that compute nothing."""
_NO_VALUES = {_aten._assert_tensor_metadata.default, _aten._assert_scalar.default}
_RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(
        (
            *(CASTS - {_aten.type_as.default}), _aten.zeros_like.default, _aten.ones_like.default,
            _aten.dropout.default, _aten.linear.default, *NORMS,
        ),
        _same,
    ),
    **dict.fromkeys(ALONG, _along),
    **dict.fromkeys(VIEWS - {_aten.flatten.using_ints}, _viewed),
    _aten.expand.default: _expanded,
    _aten.index_select.default: _looked_up,
    operator.getitem: lambda _, args, __: args[0][args[1]].value,
}  # fmt: skip
