"""`StepsAfterOthers`: the graph of any number of steps after any number of others, from a folded model's graph.

    folded   y[l] = loop(zeros, x[l]), softmax(q kᵀ[l, l] + mask[l, l]) v[l]
    steps    y[n] = loop(past, x[n]), softmax(q cat(past, k)ᵀ[n, p + n] + mask[p:, :]) cat(past, v)[p + n]

Loops, windows of convolutions and the number of the step are found as for a single step (`recurrence/found_states`).
Beside them attention is found: a product of queries with keys gives a value with two axes of time, and a product of
that with values takes the second one away. Keys and values are joined to the earlier ones. What is computed from
lengths alone (a causal mask, angles of positions), a table, is computed for all tokens so far; where it meets what is
computed from tokens, the rows of the new ones are taken. What is said of each token (is it padding?) and is looked at
by other tokens is joined like keys.

Letters: l length, n new tokens, p earlier tokens, q queries, k keys, v values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moe_export.export.decoder.attention import keyed, permuted
from moe_export.export.frontend.pytree import KEY, STATE, VALUE, WINDOW
from moe_export.export.recurrence.fold import FoldedModule
from moe_export.export.recurrence.found_states import PROBES, FoundStates
from moe_export.export.recurrence.loop_body import LoopBody

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default
_SHAPED = (aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default)
_MADE_OF_SIZES = (
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
)  # fmt: skip
_CALLED = {"state": STATE, "window": WINDOW}
_END = 2**63 - 1


class StepsAfterOthers(FoundStates):
    """The graph of any number of steps.

    Args:
        module: The folded model.
        seen: The values of its nodes at `PROBES`.

    Attributes:
        grows: The states that grow → the axis of time.
        places: What each state is called behind `past_key_values.`.
    """

    def __init__(self, module: FoldedModule, seen: Sequence[Mapping[fx.Node, Any]]) -> None:
        self.grows: dict[str, int] = {}
        self.places: list[str] = []
        self._nodes = list(module.graph.nodes)
        self._seen = seen
        self._of_tokens = self._reached()
        self._totals: dict[fx.Node, Any] = {}
        self._joined: dict[tuple[fx.Node, int], fx.Node] = {}
        self._inputs: dict[tuple[fx.Node, int], tuple[str, fx.Node, int]] = {}
        self._past_count: fx.Node | None = None
        self._all: fx.Node | None = None
        self._length = next(node for node in self._nodes if self._is_length(node))
        self._keyed = {node: found for node in self._nodes if (found := self._attends(node))}
        super().__init__(module, seen)
        self.graph.eliminate_dead_code()

    # What a node is

    def _reached(self) -> set[fx.Node]:
        """What is computed from values of tokens, not from their number alone."""
        found: set[fx.Node] = set()
        for node in self._nodes:
            if node.op == "placeholder" or (
                node.target not in _MADE_OF_SIZES
                and not isinstance(self._seen[0].get(node), int)
                and any(source in found for source in node.all_input_nodes)
            ):
                found.add(node)
        return found

    def times(self, node: Any) -> list[int]:
        """The axes of a node's value that are as long as there are tokens."""
        short, long = (values.get(node) for values in self._seen)
        if not isinstance(short, Tensor) or not isinstance(long, Tensor):
            return []
        return [
            axis for axis, sizes in enumerate(zip(short.shape, long.shape, strict=True)) if sizes == PROBES
        ]

    def _attends(self, node: fx.Node) -> list[tuple[int, int]]:
        """Arguments of a node that are looked at by all tokens, each with its axis of time."""
        if node.op != "call_function" or node not in self._of_tokens:
            return []
        return [
            (place, axis)
            for place, axis in keyed(node, self.times, lambda source: self._seen[0][source].dim())
            if _operand(node, place) in self._of_tokens
        ]

    def _is_length(self, value: Any) -> bool:
        if not isinstance(value, fx.Node):
            return False
        sizes = [values.get(value) for values in self._seen]
        return all(isinstance(size, int) for size in sizes) and tuple(sizes) == PROBES

    def _is_table(self, source: fx.Node) -> bool:
        return source not in self._of_tokens and bool(self.times(source))

    # What is found as for one step

    def _iterated(self, node: fx.Node, body: LoopBody, pasts: list[fx.Node]) -> fx.Node:
        _, sequences, captured, iterations = node.args
        read = [
            self._rows(sequence, along.axis)
            if self._keyed and self._is_table(sequence)
            else self._copies[sequence]
            for sequence, along in zip(sequences, body.elements, strict=True)  # type: ignore[arg-type]
        ]
        return self._call(node, body, pasts, read, *self._copied((captured, iterations)))

    def _count(self, node: fx.Node) -> fx.Node:
        """The numbers of the steps; keys tell how many there were before, so that nothing else has to."""
        return self._own(node) if self._keyed else super()._count(node)

    def _steps(self, node: fx.Node) -> fx.Node:
        return self._call(node, aten.sym_size.int, self._own(node), 0)

    def _numbers(self, node: fx.Node, before: fx.Node) -> fx.Node:
        return self._call(node, aten.add.Tensor, self._own(node), before)

    def _own(self, node: fx.Node) -> fx.Node:
        """A copy of a node for the new tokens alone."""
        return self.graph.node_copy(node, lambda source: self._copies[source])

    def _past(self, kind: str, first: Tensor) -> fx.Node:
        made = super()._past(kind, first)
        self.places.append(f"{self.names[-1].rpartition('_')[2]}.{_CALLED.get(kind, kind)}")
        return made

    # Attention

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self._keyed:
            return self._attention(node)
        if node in self._of_tokens and node.op == "call_function" and not isinstance(node.target, LoopBody):
            changed, sizes = dict(self._changed(node)), self._sizes(node)
            if changed or sizes is not None:
                made = self.graph.node_copy(node, lambda source: changed.get(source, self._copies[source]))
                if sizes is not None:
                    made.args = (made.args[0], sizes, *made.args[2:])
                return made
        return super()._copy(node)

    def _attention(self, node: fx.Node) -> fx.Node:
        """A product, with what is looked at joined to that of earlier tokens."""
        joined = {
            _operand(node, place): self._looked_at(node, place, axis) for place, axis in self._keyed[node]
        }
        if node.target is not _ATTENTION:
            return self.graph.node_copy(node, lambda source: joined.get(source, self._copies[source]))
        args: list[Any] = [*node.args, *(None, 0.0, False)[len(node.args) - 3 :]]
        mask, causal = node.kwargs.get("attn_mask", args[3]), node.kwargs.get("is_causal", args[5])
        kwargs = {key: value for key, value in node.kwargs.items() if key not in ("attn_mask", "is_causal")}
        made = self._call(
            node, node.target, self._copies[args[0]], *(joined.get(arg, self._copies[arg]) for arg in args[1:3]),
            self._causal(node) if causal else self._mask(mask), args[4], False,
        )  # fmt: skip
        made.kwargs = kwargs
        return made

    def _mask(self, mask: Any) -> Any:
        if mask is None or not self._is_table(mask):
            return None if mask is None else self._copies[mask]
        first = self.times(mask)[0]
        whole = self._total(mask)
        queries = first == self._seen[0][mask].dim() - 2
        return self._after(whole, first) if queries else whole

    def _causal(self, node: fx.Node) -> fx.Node:
        """Which keys come no later than each query: bool (n, p + n)."""
        everything = self._call(node, aten.arange.default, self._every())
        queries = self._call(node, aten.unsqueeze.default, self._after(everything, 0), 1)
        return self._call(node, aten.le.Tensor, everything, queries)

    def _looked_at(self, node: fx.Node, place: int, axis: int) -> fx.Node:
        """What all tokens look at, of all tokens so far."""
        source, at, turned = self._origin(_operand(node, place), axis)
        whole = self._join(source, at, self._kind(node, place))
        for one in reversed(turned):
            held: dict[Any, Any] = {**self._copies, one.args[0]: whole}
            whole = self.graph.node_copy(one, held.__getitem__)
        return whole

    def _origin(self, source: fx.Node, axis: int) -> tuple[fx.Node, int, list[fx.Node]]:
        """Where a value is (batch, heads, length, width), as runtimes have keys, and how it is turned from there.

        Otherwise the value as it is.
        """
        turned: list[fx.Node] = []
        at, place = source, axis
        while (place, self._seen[0][at].dim()) != (2, 4):
            found = permuted(at, place, self._seen[0][at].dim())
            if found is None:
                return source, axis, []
            turned.append(at)
            at, place = found
        return at, place, turned

    def _kind(self, node: fx.Node, place: int) -> str:
        """Whether what is looked at is compared with queries, or taken by what came of that."""
        if node.target is _ATTENTION:
            return KEY if place == 1 else VALUE
        return KEY if len(self.times(node)) > 1 else VALUE

    def _join(self, source: fx.Node, axis: int, kind: str = "token") -> fx.Node:
        """What is computed from all tokens so far, where `source` is computed from the new ones."""
        if (source, axis) not in self._joined:
            name, past, at = self._kept(source, axis, kind)
            turned = at != axis
            own = self._copies[source]
            own = self._call(source, aten.transpose.int, own, axis, at) if turned else own
            whole = self._call(source, aten.cat.default, [past, own], at)
            self._presents[name] = whole
            whole = self._call(source, aten.transpose.int, whole, axis, at) if turned else whole
            self._joined[source, axis] = whole
        return self._joined[source, axis]

    def _kept(self, source: fx.Node, axis: int, kind: str) -> tuple[str, fx.Node, int]:
        """The input that holds what was computed from earlier tokens, its name, and its axis of time.

        Keys of (batch, length, heads, width) are kept as runtimes have them, with the heads in front.
        """
        if (source, axis) not in self._inputs:
            first = self._seen[0][source].narrow(axis, 0, 0)
            at = 2 if (axis, first.dim()) == (1, 4) else axis
            past = self._past(kind, first.transpose(axis, at).clone())
            self.grows[self.names[-1]] = at
            self._inputs[source, axis] = self.names[-1], past, at
        return self._inputs[source, axis]

    # Tables

    def _changed(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """What a node reads in place of some of its operands: rows of tables, and what is said of other tokens."""
        out, rank = self.times(node), self._seen[0][node].dim() if self.times(node) else 0
        if not out or not self._keyed:
            return
        for source in node.all_input_nodes:
            times = self.times(source)
            behind = [axis - self._seen[0][source].dim() + rank for axis in times]
            if self._is_table(source):
                whole = self._total(source)
                if out[0] in behind:
                    whole = self._after(whole, times[behind.index(out[0])])
                yield source, whole
            elif len(out) > 1 and behind == [out[1]] and source in self._of_tokens:
                yield source, self._join(source, times[0])

    def _sizes(self, node: fx.Node) -> list[Any] | None:
        """The sizes of a reshaping, with all tokens so far where keys are; None if they need no change."""
        out = self.times(node)
        if node.target not in _SHAPED or len(out) < 2 or not self._keyed:
            return None
        sizes: Any = node.args[1]
        if not self._is_length(sizes[out[1]]):
            return None
        every = self._every()
        return [every if axis == out[1] else self._copied(size) for axis, size in enumerate(sizes)]

    def _rows(self, table: fx.Node, axis: int) -> fx.Node:
        """The rows of a table that are those of the new tokens."""
        return self._after(self._total(table), axis)

    def _after(self, whole: fx.Node, axis: int) -> fx.Node:
        return self._call(whole, aten.slice.Tensor, whole, axis, self._before(), _END)

    def _before(self) -> fx.Node:
        """How many earlier tokens there are."""
        if self._past_count is None:
            node, ((place, axis), *_) = next(iter(self._keyed.items()))
            source, at, _ = self._origin(_operand(node, place), axis)
            _, kept, along = self._kept(source, at, self._kind(node, place))
            self._past_count = self._call(node, aten.sym_size.int, kept, along)
        return self._past_count

    def _every(self) -> fx.Node:
        """How many tokens there are so far."""
        if self._all is None:
            first = next(iter(self._keyed))
            before = self._before()
            self._all = self._call(first, operator.add, before, self._copies[self._length])
        return self._all

    def _total(self, node: Any) -> Any:
        """A table, or a size that it is made of, for all tokens so far."""
        if not isinstance(node, fx.Node) or node in self._of_tokens or node.op != "call_function":
            return self._copies[node] if isinstance(node, fx.Node) else node
        if node not in self._totals:
            if self._is_length(node):
                self._totals[node] = self._every()
            else:
                self._totals[node] = self.graph.node_copy(node, self._total)
        return self._totals[node]


def _operand(node: fx.Node, place: int) -> fx.Node:
    """The tensor at a place among a node's operands; an einsum has them in a list."""
    listed: Any = node.args[1] if node.target is aten.einsum.default else node.args
    found: fx.Node = listed[place]
    return found
