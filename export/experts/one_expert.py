"""One expert's computation, cut out of code that computes all experts for all tokens.

    x (N, D), gates (N, E), weights (E, D, H) ─▶ values over tokens and experts ─▶ summed over the experts (N, H)
    x[token], gates[token, e], weights[e]     ─▶ the same operators, R tokens and one expert ─▶ rows (R, H)

`axes/analysis` says which axes of a value run over the tokens and the experts, so the same operators compute the same
for R tokens and an axis of one expert: what has an axis of tokens is read by token, a stack of weights by expert, and
the sizes of a reshape follow from what its axes run over. Experts that are modules of their own are put together along
such an axis (`stack`, `cat`), or in a chain of additions; their parts have to be alike but for the weights.

Nothing is believed: the code is run on random values, and has to be the sum of what was cut out of it.

Letters: N tokens, E experts, R rows of a body.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moe_export.errors import RefusedError
from moe_export.export.axes.extents import Extent, leaves
from moe_export.export.axes.meaning import Meanings
from moe_export.export.axes.one_hot import one_hot_mask_of
from moe_export.export.axes.operators import CASTS, TURNS, VIEWS
from moe_export.export.axes.shapes import argument, arguments, rank_of, shape_of
from moe_export.export.experts.body import Weight, sort_leaves
from moe_export.export.experts.canonical import Walk
from moe_export.export.experts.derived import derived
from moe_export.export.experts.notes import named
from moe_export.export.gates.region import ancestors, is_size
from moe_export.export.sizes import expression_of, fixed, same_size
from moe_export.float64 import agree, doubled, in_float64

_aten = torch.ops.aten
_JOINS = {_aten.cat.default, _aten.stack.default}
_SPLITS = {
    _aten.unbind.int: 1, _aten.chunk.default: 2, _aten.split.Tensor: 2, _aten.split_with_sizes.default: 2,
}  # fmt: skip
_SIZES = ("size", "shape")  # what schemas call the sizes of a result
_TRIED = 3  # tokens that the code is tried on
_EXACT = 1e-9  # of the largest value: float64 rounds at 1e-16, and a real difference is far larger


@dataclass(frozen=True)
class Scope:
    """What is known of the tokens and the experts of some code.

    Attributes:
        known: What the axes of values run over.
        tokens: What the tokens run over.
        experts: What the experts run over.
        count: E.
        value_numbers: Each node → the first node that computes the same.
    """

    known: Meanings
    tokens: frozenset[Extent]
    experts: frozenset[Extent]
    count: int
    value_numbers: Mapping[fx.Node, fx.Node]

    def axis_of(self, node: fx.Node, of: frozenset[Extent]) -> int | None:
        """The axis of a value that runs over the tokens, or over the experts; None if it has none.

        Raises:
            RefusedError: It has several, or its axis runs over more.
        """
        axes = self.known.axes(node)
        found = [place for place, axis in enumerate(axes) if not of.isdisjoint(axis)]
        if len(found) > 1 or any(set(axes[place]) != of for place in found):
            raise RefusedError(f"{named(node)} has no axis of tokens or experts alone")
        return found[0] if found else None

    def of_experts(self, node: fx.Node) -> bool:
        """Whether an axis of a value, or of a part of it, runs over the experts."""
        axes = [axis for part in self.known.found.get(node, ()) for axis in part.axes]
        return not self.experts.isdisjoint(leaves([self.known.extents.of(axis) for axis in axes]))

    def is_table(self, node: fx.Node) -> bool:
        """Whether a value has one entry for each token and expert, such as gates, and is no other one rearranged."""
        axes = [set(axis) for axis in self.known.axes(node)]
        both = [set(self.tokens), set(self.experts)]
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
        self._scope, self._results = scope, results
        joined = [arguments(node)[0] for node in ancestors(results) if self._is_join(node)]
        joined += [results] if len(results) > 1 else []
        self._common = {node for parts in joined for node in ancestors([parts[0]]) & ancestors([parts[1]])}
        self._own = ancestors([part for parts in joined for part in parts]) - self._common
        self._walks = [self._walk(number) for number in range(scope.count if joined else 1)]
        found, weights, kinds = sort_leaves(self._walks, scope.value_numbers)
        self._leaves = dict(zip(self._walks[0].leaves, kinds, strict=True))
        stacks = [leaf for leaf in found if scope.of_experts(leaf) and not scope.is_table(leaf)]
        self.outside = tuple(leaf for leaf in found if leaf not in stacks)
        separate = iter(weights)
        self._weights = {
            leaf: next(separate) if kind == "weight" else Weight(stack=_experts_first(leaf, scope))
            for leaf, kind in self._leaves.items()
            if kind == "weight" or leaf in stacks
        }
        self.weights = tuple(self._weights.values())
        masks = [one_hot_mask_of(node) for node in self._walks[0].nodes if self._is_mark(node, 0)]
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
            return self._scope.value_numbers[node] if node in self._common else node

        return Walk(self._results[number % len(self._results)], self._end, same, given, compared)

    def _end(self, node: fx.Node) -> Any:
        if is_size(node):
            return ("size", str(expression_of(node.meta["val"])))
        if node.op != "call_function" or self._scope.is_table(node):
            return "leaf"
        inside = node in self._own or node in self._results or self._scope.of_experts(node)
        lines_up = node.target is _aten.unsqueeze.default and self._scope.axis_of(node, self._scope.tokens)
        return None if inside or lines_up else "leaf"

    def _along_experts(self, node: fx.Node, axis: int) -> bool:
        return not self._scope.experts.isdisjoint(self._scope.known.axes(node)[axis])

    def _is_join(self, node: fx.Node) -> bool:
        """Whether a node puts the parts of all experts together."""
        if node.target not in _JOINS or len(arguments(node)[0]) != self._scope.count:
            return False
        return bool(self._scope.known.axes(node)) and self._along_experts(node, argument(node, 1, "dim", 0))

    def _picks(self, node: fx.Node) -> int | None:
        """The axis of the experts along which a node takes one of them; None for any other node."""
        source = arguments(node)[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        if node.target is operator.getitem and source.target in _SPLITS:
            source, axis = arguments(source)[0], argument(source, _SPLITS[source.target], "dim", 0)
        elif node.target in (_aten.select.int, _aten.slice.Tensor):
            axis = argument(node, 1, "dim", 0)
        else:
            return None
        found = self._scope.known.axes(source)
        return axis % len(found) if found and self._along_experts(source, axis) else None

    def _is_mark(self, node: fx.Node, number: int) -> bool:
        """Whether a node is `indices == e` for this expert's number."""
        mask = one_hot_mask_of(node) if node.target is _aten.eq.Scalar else None
        return mask is not None and mask.expert == number

    def module(self, gates: Mapping[fx.Node, fx.Node]) -> fx.GraphModule:
        """The body, `(token, slot, expert, *outside, *weights) → rows`.

        Args:
            gates: Tables → their entries for the chosen experts, (N, k), which the body takes instead.
        """
        graph = fx.Graph()
        token, slot, expert = (graph.placeholder(name) for name in ("token", "slot", "expert"))
        made: dict[fx.Node, Any] = {}
        for node in (*self.outside, *self._weights):
            made[node] = graph.placeholder(f"input_{len(made)}")
            made[node].meta = dict(gates.get(node, node).meta)
        call = graph.call_function
        for node in self.outside:
            by_token, by_expert = (
                self._scope.axis_of(node, of) for of in (self._scope.tokens, self._scope.experts)
            )
            if node in gates:
                entry = call(_aten.index.Tensor, (made[node], [token, slot]))
                made[node] = call(_aten.unsqueeze.default, (entry, by_expert))
                continue
            if by_token == 0:
                made[node] = call(_aten.index.Tensor, (made[node], [token]))
            elif by_token is not None:
                made[node] = call(_aten.index_select.default, (made[node], by_token, token))
            if by_expert is not None:
                made[node] = call(_aten.index_select.default, (made[node], by_expert, expert))
        for node, weight in self._weights.items():
            axis = self._scope.axis_of(node, self._scope.experts)
            if weight.stack is not None:
                made[node] = call(_aten.unsqueeze.default, (made[node], axis))
        for node in self._walks[0].nodes:
            made[node] = self._copied(graph, node, made, expert, token)
        graph.output(made[self._results[0]])
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        return fx.GraphModule(nn.Module(), graph)

    def _copied(
        self, graph: fx.Graph, node: fx.Node, made: Mapping[fx.Node, Any], expert: fx.Node, token: fx.Node
    ) -> fx.Node:
        """A node for R tokens and one expert."""
        call, axis, args = graph.call_function, self._picks(node), arguments(node)
        if self._is_join(node):
            own: fx.Node = made[args[0][0]]
            at = argument(node, 1, "dim", 0)
            return own if node.target is _aten.cat.default else call(_aten.unsqueeze.default, (own, at))
        if axis is not None:
            drops = rank_of(node) < rank_of(
                args[0] if node.target is not operator.getitem else arguments(args[0])[0]
            )
            return call(_aten.squeeze.dim, (made[args[0]], axis)) if drops else made[args[0]]
        if node.target in _SPLITS and self._along_experts(
            args[0], argument(node, _SPLITS[node.target], "dim", 0)
        ):
            return made[args[0]]  # type: ignore[no-any-return]
        if self._is_mark(node, 0):
            return call(_aten.eq.Tensor, (made[args[0]], expert))
        names = [each.name for each in getattr(getattr(node.target, "_schema", None), "arguments", ())]
        new = [
            list(self._sizes(graph, node, token)) if name in _SIZES else given
            for name, given in zip(names, args, strict=False)
        ]
        if node.target is _aten.repeat.default:
            axes = self._scope.known.axes(node)
            new[1] = [
                1
                if same_size(times, self._scope.count) and not self._scope.experts.isdisjoint(axis)
                else times
                for times, axis in zip(args[1], axes, strict=True)
            ]

        def known(source: fx.Node) -> Any:
            if source not in made and source.graph is not graph:
                raise RefusedError(f"the experts use a size of a value outside them, {named(source)}")
            return made.get(source, source)

        target: Any = node.target
        return call(target, tuple(fx.map_arg(new or args, known)), dict(fx.map_arg(node.kwargs, known)))

    def _sizes(self, graph: fx.Graph, node: fx.Node, token: fx.Node) -> Iterator[Any]:
        """The sizes of a result for R tokens and one expert."""
        for axis, size in zip(self._scope.known.axes(node), shape_of(node), strict=True):
            if self._scope.tokens.isdisjoint(axis) and self._scope.experts.isdisjoint(axis):
                if fixed(size) is None:
                    raise RefusedError(f"{named(node)} has a free size that is not that of the tokens")
                yield fixed(size)
            elif not self._scope.tokens.isdisjoint(axis):
                yield -1 if node.target in VIEWS else graph.call_function(_aten.sym_size.int, (token, 0))
            else:
                rest = [extent.size for extent in axis if extent not in self._scope.experts]
                yield _product(rest)

    def check(self, module: fx.GraphModule, gates: Mapping[fx.Node, fx.Node], chosen: fx.Node) -> None:
        """Run the code on random values: it has to be the sum over the experts, of which those not chosen give 0.

        Args:
            module: The body.
            gates: As `module` took them.
            chosen: Says which experts are chosen: a table that is 0 elsewhere, or their numbers (N, k).

        Raises:
            RefusedError: It is not, or cannot be run.
        """
        generator = torch.Generator().manual_seed(0)
        leaves = dict.fromkeys(leaf for walk in self._walks for leaf in walk.leaves)
        values = {leaf: self._random(leaf, generator, leaf is chosen) for leaf in leaves}
        with torch.no_grad(), in_float64():
            try:
                wide = {leaf: doubled(value) for leaf, value in values.items()}
                rows = torch.arange(_TRIED)
                found = [
                    module(
                        rows,
                        torch.zeros_like(rows),
                        torch.tensor([number]),
                        *self._inputs(wide, gates, number),
                    )
                    for number in range(self._scope.count)
                ]
                expected = sum(self._run(end, wide) for end in self._results)
            except Exception as error:
                raise RefusedError(f"the experts cannot be run on other tokens: {error}") from error
        if not agree([expected], [sum(found)], _EXACT):
            raise RefusedError(f"what {named(self._results[-1])} gives is not a sum over the experts")
        for number, value in enumerate(found):
            if value[~self._chosen(values[chosen], chosen, number)].count_nonzero():
                raise RefusedError("an expert is not 0 where it was not chosen")

    def _chosen(self, value: torch.Tensor, gates: fx.Node, number: int) -> torch.Tensor:
        axis = self._scope.axis_of(gates, self._scope.experts)
        return (
            (value.reshape(_TRIED, -1) == number).any(1) if axis is None else value.select(axis, number) != 0
        )

    def _random(self, node: fx.Node, generator: torch.Generator, is_gates: bool) -> torch.Tensor:
        """Random values; of gates a half is 0, and numbers name each expert once."""
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise RefusedError(f"the experts read {named(node)}, which is no tensor")
        axis = self._scope.axis_of(node, self._scope.tokens)
        sizes = [_TRIED if place == axis else fixed(size) for place, size in enumerate(shape_of(node))]
        numbers = [size for size in sizes if size is not None]
        dtype = node.meta["val"].dtype
        if len(numbers) < len(sizes):
            raise RefusedError(f"the experts read {named(node)}, whose size is free")
        value = torch.rand(numbers, generator=generator)
        if dtype is torch.bool:
            return value > 0.5
        if not dtype.is_floating_point:
            each = [*numbers, 1][: max(2, len(numbers))]  # of a vector, the numbers of one slot
            order = torch.rand([*each[:-1], self._scope.count], generator=generator).argsort(-1)
            return order[..., : each[-1]].reshape(numbers).to(dtype)
        normal = torch.randn(numbers, generator=generator).to(dtype)
        return normal * (value > 0.5) if is_gates else normal

    def _inputs(
        self, values: Mapping[fx.Node, torch.Tensor], gates: Mapping[fx.Node, fx.Node], number: int
    ) -> Iterator[torch.Tensor]:
        """The body's inputs for one expert, of which the gates of all tokens stand in one slot."""
        for node in self.outside:
            axis = self._scope.axis_of(node, self._scope.experts) or 0
            yield values[node].select(axis, number).unsqueeze(1) if node in gates else values[node]
        for node, weight in self._weights.items():
            if weight.stack is None:
                yield values[weight.separate[number]]
            else:
                yield values[node].select(self._scope.axis_of(node, self._scope.experts) or 0, number)

    def _run(self, result: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """What the code computes."""
        whole = Walk(result, lambda node: "leaf" if node in values else ("size" if is_size(node) else None))
        made = dict(values)

        def known(node: fx.Node) -> Any:
            if node in made or not is_size(node):
                return made[node]
            size = fixed(node.meta["val"])
            return _TRIED if size is None else size

        for node in whole.nodes:
            target: Any = node.target
            made[node] = target(*fx.map_arg(node.args, known), **fx.map_arg(node.kwargs, known))
        return made[result]


def _product(sizes: Sequence[Any]) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


def _experts_first(leaf: fx.Node, scope: Scope) -> fx.Node:
    """A stack of weights with the axis of the experts in front."""
    axis = scope.axis_of(leaf, scope.experts)
    if not axis:
        return leaf
    order = [axis, *(place for place in range(rank_of(leaf)) if place != axis)]
    return derived(leaf, _aten.permute.default, leaf, order)
