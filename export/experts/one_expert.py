"""One expert's computation, cut out of code that computes all experts.

    x (N, D), gates (N, E), weights (E, D, H) ─▶ values over tokens and experts ─▶ summed over the experts (N, H)
    x[token], gates[token, e], weights[e]     ─▶ the same operators, R tokens and one expert ─▶ rows (R, H)

    slots (E, C, D), weights (E, D, H)        ─▶ values over experts and slots  ─▶ what is in each slot (E, C, H)
    rows (R, D), weights[e]                   ─▶ the same operators, R rows and one expert ─▶ rows (R, H)

`axes/analysis` says which axes of a value run over the rows (tokens, or slots in groups) and the experts, so the same
operators compute the same for R rows and an axis of one expert: what has an axis of tokens is read by token, slots are
replaced by the rows (the seed), a stack of weights is read by expert, and the sizes of a reshape follow from what its
axes run over. Experts that are modules of their own are put together along such an axis (`stack`, `cat`), or in a chain
of additions; their parts have to be alike but for the weights.

Nothing is believed: `experts/trial` runs the code and what was cut out of it on random values.

Letters: N tokens, E experts, C slots of an expert, R rows of a body.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moe_export.errors import RefusedError
from moe_export.export.axes.extents import Axis, leaves, size_of
from moe_export.export.axes.meaning import Meanings
from moe_export.export.axes.one_hot import one_hot_mask_of
from moe_export.export.axes.operators import ADDS_AN_AXIS, CASTS, JOINS, PARTS, TURNS, VIEWS
from moe_export.export.axes.shapes import arguments, named_axis, rank_of, shape_of
from moe_export.export.experts.body import Weight, sort_leaves
from moe_export.export.experts.canonical import Walk
from moe_export.export.experts.derived import derived
from moe_export.export.experts.notes import named
from moe_export.export.gates.region import ancestors, descendants, is_size
from moe_export.export.sizes import expression_of, fixed, same_size
from moe_export.export.torch_compat.operators import arguments_of
from moe_export.export.tracing.weight_inputs import is_weight

_aten = torch.ops.aten
_SPLITS = {*PARTS, _aten.unbind.int}
_MARK_ALL = {_aten.one_hot.default, _aten.eq.Tensor}
_SIZES = ("size", "shape")  # what schemas call the sizes of a result


@dataclass(frozen=True)
class Scope:
    """What is known of the rows and the experts of some code.

    Attributes:
        known: What the axes of values run over.
        rows: What the rows run over, the slowest first: the tokens; or groups and slots.
        experts: What the experts run over.
        count: E.
        value_numbers: Each node → the first node that computes the same.
        seed: The slots that hold the rows, where the code begins with those and not with tokens.
    """

    known: Meanings
    rows: Axis
    experts: Axis
    count: int
    value_numbers: Mapping[fx.Node, fx.Node]
    seed: fx.Node | None = None

    def experts_axis(self, node: fx.Node) -> int | None:
        """The axis of a value that runs over the experts; None if it has none.

        Raises:
            RefusedError: It has several, or its axis runs over more.
        """
        axes = self.known.axes(node)
        found = [place for place, axis in enumerate(axes) if not set(self.experts).isdisjoint(axis)]
        if len(found) > 1 or any(set(axes[place]) != set(self.experts) for place in found):
            raise RefusedError(f"{named(node)} has no axis of experts alone")
        return found[0] if found else None

    def rows_axes(self, node: fx.Node) -> range:
        """The axes of a value that run over the rows: (batch, time) are two, side by side.

        Raises:
            RefusedError: They run over more, or over some of the rows only.
        """
        axes = self.known.axes(node)
        found = [place for place, axis in enumerate(axes) if not set(self.rows).isdisjoint(axis)]
        own = range(found[0], found[-1] + 1) if found else range(0)
        if found and tuple(extent for place in own for extent in axes[place]) != self.rows:
            raise RefusedError(f"{named(node)} has no axis of tokens alone")
        return own

    def of_experts(self, node: fx.Node) -> bool:
        """Whether an axis of a value, or of a part of it, runs over the experts."""
        axes = [axis for part in self.known.found.get(node, ()) for axis in part.axes]
        return not set(self.experts).isdisjoint(leaves([self.known.extents.of(axis) for axis in axes]))

    def is_table(self, node: fx.Node) -> bool:
        """Whether a value has one entry for each token and expert, such as gates, and is no other one rearranged."""
        axes = [set(axis) for axis in self.known.axes(node)]
        both = [set(self.rows), set(self.experts)]
        return axes in (both, both[::-1]) and node.target not in TURNS | CASTS | VIEWS


class OneExpert:
    """What one expert computes.

    Attributes:
        outside: The values that all experts read.
        weights: The experts' own weights, in the order of the body's inputs.
        marks: Chosen experts, where a mask `indices == e` is part of the computation.

    Args:
        results: The node in which the experts are added up; or what each of them adds.
        scope: The tokens and the experts.

    Raises:
        RefusedError: The experts differ in more than their weights, or an axis is not known.
    """

    def __init__(self, results: Sequence[fx.Node], scope: Scope) -> None:
        self.scope, self.results = scope, results
        self._below = descendants([scope.seed] if scope.seed is not None else [])
        joined = [arguments(node)[0] for node in ancestors(results) if self._is_join(node)]
        joined += [results] if len(results) > 1 else []
        self._common = {node for parts in joined for node in ancestors([parts[0]]) & ancestors([parts[1]])}
        self._own = ancestors([part for parts in joined for part in parts]) - self._common
        self.walks = [self._walk(number) for number in range(scope.count if joined else 1)]
        found, weights, kinds = sort_leaves(self.walks, scope.value_numbers)
        leaves_of = dict(zip(self.walks[0].leaves, kinds, strict=True))
        stacks = [leaf for leaf in found if scope.of_experts(leaf) and not scope.is_table(leaf)]
        self.outside = (*self.walks[0].seeds, *(leaf for leaf in found if leaf not in stacks))
        separate = iter(weights)
        self.inputs: Mapping[fx.Node, Weight] = {
            leaf: next(separate) if kind == "weight" else Weight(stack=_experts_first(leaf, scope))
            for leaf, kind in leaves_of.items()
            if kind == "weight" or leaf in stacks
        }
        self.weights = tuple(self.inputs.values())
        marks = (node for node in self.walks[0].nodes if self._is_mark(node, 0) or self._marks_all(node))
        masks = map(one_hot_mask_of, marks)
        self.marks = {mask.indices for mask in masks if mask is not None}

    def _walk(self, number: int) -> Walk:
        """The nodes of one expert, in a fixed order."""

        def given(source: fx.Node, user: fx.Node) -> str | None:
            other = self._is_join(user) and source is not arguments(user)[0][number]
            return "another expert" if other else None

        def compared(node: fx.Node) -> Any:
            if self._picks(node) is not None or self._is_mark(node, number):
                first = (
                    1 if node.target in (operator.getitem, _aten.eq.Scalar) else 2
                )  # before that: the axis
                return node.args[:first] + tuple(each - number for each in arguments(node)[first:])
            return [arguments(node)[0][number]] if self._is_join(node) else node.args

        def same(node: fx.Node) -> fx.Node:
            is_common = node in self._common and node is not self.scope.seed
            return self.scope.value_numbers[node] if is_common else node

        return Walk(self.results[number % len(self.results)], self._end, same, given, compared)

    def _end(self, node: fx.Node) -> Any:
        if node is self.scope.seed:
            return "seed"
        if is_size(node):
            return ("size", str(expression_of(node.meta["val"])))
        if node in self._below:
            return None
        of_slots = self.scope.seed is not None and not _is_of_weights(node)
        if node.op != "call_function" or self.scope.is_table(node) or of_slots:
            return "leaf"
        inside = node in self._own or node in self.results or self.scope.of_experts(node)
        lines_up = node.target is _aten.unsqueeze.default and any(self.scope.rows_axes(node)[:1])
        return None if inside or lines_up else "leaf"

    def _along_experts(self, node: fx.Node, axis: int) -> bool:
        return not set(self.scope.experts).isdisjoint(self.scope.known.axes(node)[axis])

    def _is_join(self, node: fx.Node) -> bool:
        """Whether a node puts the parts of all experts together."""
        if node.target not in JOINS or len(arguments(node)[0]) != self.scope.count:
            return False
        return bool(self.scope.known.axes(node)) and self._along_experts(node, named_axis(node))

    def _picks(self, node: fx.Node) -> int | None:
        """The axis of the experts along which a node takes one of them; None for any other node."""
        source = arguments(node)[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        if node.target is operator.getitem and source.target in _SPLITS:
            node, source = source, arguments(source)[0]
        elif node.target not in (_aten.select.int, _aten.slice.Tensor):
            return None
        axis = named_axis(node)
        return axis if self.scope.known.axes(source) and self._along_experts(source, axis) else None

    def _is_mark(self, node: fx.Node, number: int) -> bool:
        """Whether a node is `indices == e` for this expert's number."""
        mask = one_hot_mask_of(node) if node.target is _aten.eq.Scalar else None
        return mask is not None and mask.expert == number

    def _marks_all(self, node: fx.Node) -> bool:
        """Whether a node is the one-hot mask of chosen experts, with an axis of all of them."""
        mask = one_hot_mask_of(node) if node.target in _MARK_ALL else None
        return mask is not None and mask.axes[-1] == "expert" and self.scope.of_experts(node)

    def module(
        self,
        instead: Mapping[fx.Node, fx.Node],
        factors: tuple[fx.Node | None, fx.Node | None] = (None, None),
    ) -> fx.GraphModule:
        """The body, `(token, slot, expert, *outside, *factors, *weights) → rows`.

        Args:
            instead: What the body takes instead of others: for a table its entries for the chosen experts, (N, k), and
                for slots the tokens (N, M), of which its rows are read.
            factors: (N, k), what a pair's row is multiplied by, before and behind; None for 1.
        """
        graph = fx.Graph()
        call = graph.call_function
        token, slot, expert = (graph.placeholder(name) for name in ("token", "slot", "expert"))
        made: dict[fx.Node, Any] = {}
        for node in (*self.outside, *(each for each in factors if each is not None), *self.inputs):
            made[node] = graph.placeholder(f"input_{len(made)}")
            made[node].meta = dict(instead.get(node, node).meta)

        def times(rows: fx.Node, factor: fx.Node | None) -> fx.Node:
            if factor is None:
                return rows
            picked = call(_aten.index.Tensor, (made[factor], [token, slot]))
            return call(_aten.mul.Tensor, (rows, call(_aten.unsqueeze.default, (picked, 1))))

        for node in self.outside:
            if node is self.scope.seed:
                rows = times(call(_aten.index.Tensor, (made[node], [token])), factors[0])
                made[node] = _viewed(call, rows, list(self._sizes(graph, node, token, VIEWS)))
            else:
                made[node] = self._read(call, node, made[node], node in instead, (token, slot, expert))
        for node, weight in self.inputs.items():
            axis = self.scope.experts_axis(node)
            if weight.stack is not None:
                made[node] = call(_aten.unsqueeze.default, (made[node], axis))
        for node in self.walks[0].nodes:
            made[node] = self._copied(graph, node, made, expert, token)
        found = made[self.results[0]]
        if self.scope.seed is not None:
            *lead, width = shape_of(self.results[0])
            found = found if len(lead) == 1 else call(_aten.reshape.default, (found, [-1, fixed(width)]))
        else:
            found = self._rows_first(call, found)
        graph.output(times(found, factors[1]))
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        return fx.GraphModule(nn.Module(), graph)

    def _read(
        self,
        call: Any,
        node: fx.Node,
        value: fx.Node,
        is_table: bool,
        pairs: tuple[fx.Node, fx.Node, fx.Node],
    ) -> fx.Node:
        """What rows read of a value outside: by token, and by expert."""
        token, slot, expert = pairs
        by_token, by_expert = self.scope.rows_axes(node), self.scope.experts_axis(node)
        if is_table:
            entry = call(_aten.index.Tensor, (value, [token, slot]))
            return call(_aten.unsqueeze.default, (entry, by_expert))  # type: ignore[no-any-return]
        if by_token and self.scope.seed is not None:
            raise RefusedError(f"the experts read {named(node)}, which differs from slot to slot")
        if len(by_token) > 1:
            value = call(_aten.flatten.using_ints, (value, by_token[0], by_token[-1]))
        if by_token and by_token[0] == 0:
            value = call(_aten.index.Tensor, (value, [token]))
        elif by_token:
            value = call(_aten.index_select.default, (value, by_token[0], token))
        for place in by_token[:-1]:
            value = call(_aten.unsqueeze.default, (value, place))
        if by_expert is not None:
            value = call(_aten.index_select.default, (value, by_expert, expert))
        return value

    def _rows_first(self, call: Any, value: fx.Node) -> fx.Node:
        """What one expert gives for R rows: (R, 1, ...) of a result of all experts, as it is of a sum over them."""
        rows, experts = self.scope.rows_axes(self.results[0]), self.scope.experts_axis(self.results[0])
        if len(rows) > 1:
            raise RefusedError(f"the rows of {named(self.results[0])} have several axes")
        if experts is None or (*rows, experts) == (0, 1):
            return value
        is_alone = value.target is _aten.unsqueeze.default and arguments(value)[1] == experts
        bare = arguments(value)[0] if is_alone else call(_aten.squeeze.dim, (value, experts))
        place = rows[0] - (experts < rows[0])
        if place:
            order = [place, *(other for other in range(rank_of(self.results[0]) - 1) if other != place)]
            bare = call(_aten.permute.default, (bare, order))
        return call(_aten.unsqueeze.default, (bare, 1))  # type: ignore[no-any-return]

    def _copied(
        self, graph: fx.Graph, node: fx.Node, made: Mapping[fx.Node, Any], expert: fx.Node, token: fx.Node
    ) -> fx.Node:
        """A node for R tokens and one expert."""
        call, axis, args = graph.call_function, self._picks(node), arguments(node)
        if self._is_join(node):
            own: fx.Node = made[args[0][0]]
            adds = node.target in ADDS_AN_AXIS
            return call(_aten.unsqueeze.default, (own, named_axis(node))) if adds else own
        if axis is not None:
            drops = rank_of(node) < rank_of(
                args[0] if node.target is not operator.getitem else arguments(args[0])[0]
            )
            return _squeezed(call, made[args[0]], axis) if drops else made[args[0]]
        if node.target in _SPLITS and self._along_experts(args[0], named_axis(node)):
            return made[args[0]]  # type: ignore[no-any-return]
        if self._is_mark(node, 0):
            return call(_aten.eq.Tensor, (made[args[0]], expert))
        if self._marks_all(node):
            chosen = next(
                made[each] for each in args if isinstance(each, fx.Node) and self.scope.rows_axes(each)
            )
            if node.target is _aten.eq.Tensor:
                return call(_aten.eq.Tensor, (chosen, expert))
            is_own = call(_aten.eq.Tensor, (call(_aten.unsqueeze.default, (chosen, -1)), expert))
            return call(_aten._to_copy.default, (is_own,), {"dtype": torch.int64})
        names = [each.name for each in arguments_of(node.target)]
        new = [
            list(self._sizes(graph, node, token, {node.target})) if name in _SIZES else given
            for name, given in zip(names, args, strict=False)
        ]
        if node.target is _aten.repeat.default:
            axes = self.scope.known.axes(node)
            new[1] = [
                1
                if same_size(times, self.scope.count) and not set(self.scope.experts).isdisjoint(axis)
                else times
                for times, axis in zip(args[1], axes, strict=True)
            ]

        def known(source: fx.Node) -> Any:
            if source not in made and source.graph is not graph:
                raise RefusedError(f"the experts use a size of a value outside them, {named(source)}")
            return made.get(source, source)

        target: Any = node.target
        return call(target, tuple(fx.map_arg(new or args, known)), dict(fx.map_arg(node.kwargs, known)))

    def _sizes(self, graph: fx.Graph, node: fx.Node, token: fx.Node, by: Collection[Any]) -> Iterator[Any]:
        """The sizes of a value for R rows and one expert, as these operators take them.

        The slots of an expert have an axis for each of their groups; R rows have the last one only.
        """
        rows, all_of = self.scope.rows, {*self.scope.rows, *self.scope.experts}
        for axis, size in zip(self.scope.known.axes(node), shape_of(node), strict=True):
            if all_of.isdisjoint(axis):
                if fixed(size) is None:
                    raise RefusedError(f"{named(node)} has a free size that is not that of the tokens")
                yield fixed(size)
            elif rows[-1] in axis:
                is_view = not VIEWS.isdisjoint(by)
                yield -1 if is_view else graph.call_function(_aten.sym_size.int, (token, 0))
            else:
                yield size_of(extent for extent in axis if extent not in all_of)


def _viewed(call: Any, rows: fx.Node, sizes: list[Any]) -> fx.Node:
    """Rows (R, D) with axes of size 1; as they are if there are none."""
    return rows if len(sizes) == 2 else call(_aten.reshape.default, (rows, sizes))


def _squeezed(call: Any, value: fx.Node, axis: int) -> fx.Node:
    """A value without an axis of size 1, which rows have only just been given."""
    if value.target is _aten.reshape.default:
        rows, sizes = arguments(value)
        return _viewed(call, rows, [*sizes[:axis], *sizes[axis + 1 :]])
    return call(_aten.squeeze.dim, (value, axis))  # type: ignore[no-any-return]


def _is_of_weights(node: fx.Node) -> bool:
    """Whether a value is a weight, or made of weights alone."""
    if node.op == "placeholder":
        return is_weight(node)
    return bool(node.all_input_nodes) and all(map(_is_of_weights, node.all_input_nodes))


def _experts_first(leaf: fx.Node, scope: Scope) -> fx.Node:
    """A stack of weights with the axis of the experts in front."""
    axis = scope.experts_axis(leaf)
    if not axis:
        return leaf
    order = [axis, *(place for place in range(rank_of(leaf)) if place != axis)]
    return derived(leaf, _aten.permute.default, leaf, order)
