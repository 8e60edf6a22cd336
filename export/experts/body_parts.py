"""Split an expert's body: a prologue for every pair, a core that needs the expert's weights, an epilogue on its rows.

    token, slot, shared ─▶ prologue ─▶ core ─▶ epilogue ─▶ rows
                                        ▲
                            weights ─▶ prepared

The body works row by row, so `prologue` and `epilogue` may run on all S pairs at once, in any order, and only `core` is
written once an expert. `prepared` reads nothing but weights (usually it is a transpose) and is applied to the weights
of all experts, offline if they are constants.

A value passes from one part to the next only if its leading axes are the rows; a value that contains the number of rows
(a `Shape`) is computed where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.errors import Code, NotExportableError
from moe_export.export.experts.sorting import with_lead
from moe_export.graph_builder import GraphBuilder

_FEW = 8  # entries of an integer vector that all its readers share, so that it needs no name of its own

TOKEN, SLOT, EXPERT = 0, 1, 2
"""Positions of a body's inputs; shared values and weights come after them."""


@dataclass(frozen=True)
class BodyParts:
    """A body in its parts. Nodes and values are those of the body's own graph; nodes are in its order.

    Attributes:
        body: `(token, slot, expert, *shared, *weights) → rows`; the axes of the rows come first.
        shared: The inputs that every expert reads.
        weights: The inputs that belong to one expert.
        prepared: Nodes that read weights only.
        common: Nodes that depend neither on pairs nor on the expert.
        prologue, core, epilogue: See the module's docstring.
        entering: Row values that `core` takes from `prologue`; also token and slot, if it reads them.
        leaving: Row values that `core` passes to `epilogue`, or that are the result.
        ready: Weights as `core` takes them: inputs of the body, or results of `prepared`.
    """

    body: ir.Graph
    shared: tuple[ir.Value, ...]
    weights: tuple[ir.Value, ...]
    prepared: tuple[ir.Node, ...]
    common: tuple[ir.Node, ...]
    prologue: tuple[ir.Node, ...]
    core: tuple[ir.Node, ...]
    epilogue: tuple[ir.Node, ...]
    entering: tuple[ir.Value, ...]
    leaving: tuple[ir.Value, ...]
    ready: tuple[ir.Value, ...]


def split_body(body: ir.Graph, shared: int) -> BodyParts:
    """Split a body into its parts. `GatherND` by one index is replaced by `Gather` in the body, in place.

    Args:
        body: `(token, slot, expert, *shared, *weights) → rows`.
        shared: How many of its inputs are shared values.
    """
    _gather_rows(body)
    inputs, nodes = tuple(body.inputs), list(body)
    weights = inputs[3 + shared :]
    prepared = _only_of(nodes, weights, {*inputs[: 3 + shared]})
    ready = {*weights, *_given(prepared)}
    nodes = _without(nodes, prepared)
    pairs = _below(nodes, {inputs[TOKEN], inputs[SLOT]})
    core = _core(nodes, {*ready, inputs[EXPERT]}, {*_given(pairs)}, inputs[TOKEN])
    epilogue = _without(_below(nodes, _given(core)), core)
    prologue = _without([node for node in nodes if node in set(pairs)], [*core, *epilogue])
    taken, used = _taken(core), {*_taken(epilogue), *body.outputs}
    reachable = {inputs[TOKEN], inputs[SLOT], *_given(prologue)}
    return BodyParts(
        body=body,
        shared=inputs[3 : 3 + shared],
        weights=weights,
        prepared=tuple(prepared),
        common=tuple(_without(nodes, [*prologue, *core, *epilogue])),
        prologue=tuple(prologue),
        core=tuple(core),
        epilogue=tuple(epilogue),
        entering=tuple(value for value in taken if value in reachable),
        leaving=tuple(value for value in _given(core) if value in used),
        ready=tuple(value for value in taken if value in ready),
    )


def _gather_rows(body: ir.Graph) -> None:
    """Write `x[token]` as a plain Gather, in place: torch's exporter writes GatherND with one index."""
    for node in list(body):
        if node.op_type == "GatherND" and not node.attributes.get_int("batch_dims", 0):
            index = _unsqueezed(node.inputs[1])
            if index is not None:
                plain = ir.node("Gather", [node.inputs[0], index], {"axis": 0})
                plain.outputs[0].shape, plain.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
                ir.convenience.replace_nodes_and_values(
                    body, node, [node], [plain], node.outputs, plain.outputs
                )


def _unsqueezed(value: ir.Value | None) -> ir.Value | None:
    """The value that a last axis of size 1 was added to; None for any other value."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Unsqueeze" or value is None or value.shape is None:
        return None
    axes = node.inputs[1].const_value if node.inputs[1] is not None else None
    last = axes is not None and axes.numpy().tolist() in ([-1], [len(value.shape) - 1])
    return node.inputs[0] if last else None


def _core(
    nodes: Sequence[ir.Node], own: set[ir.Value], of_pairs: set[ir.Value], token: ir.Value
) -> list[ir.Node]:
    """The nodes that read the expert's number or weights, those between them, and those that exchange values with them
    whose leading axes are not the rows.
    """
    core = {node for node in nodes if any(value in own for value in node.inputs)}
    while True:
        before = len(core)
        below, above = set(_below(nodes, _given(core))), set(_above(nodes, _taken(core)))
        core |= below & above
        wanted, given = set(_taken(core)), set(_given(core))
        for node in nodes:
            enters = any(value in wanted and not _is_led(value, token) for value in node.outputs)
            if enters and node not in below and any(value in of_pairs for value in node.outputs):
                core.add(node)
            if node in below and any(value in given and not _is_led(value, token) for value in node.inputs):
                core.add(node)
        if len(core) == before:
            return [node for node in nodes if node in core]


def _is_led(value: ir.Value | None, token: ir.Value) -> bool:
    """Whether a value's leading axes are the rows, like those of `token`."""
    assert token.shape is not None
    if value is None or value.shape is None or len(value.shape) < len(token.shape):
        return False
    return tuple(value.shape)[: len(token.shape)] == tuple(token.shape)


def _only_of(nodes: Iterable[ir.Node], weights: Iterable[ir.Value], others: set[ir.Value]) -> list[ir.Node]:
    """The nodes that read weights and constants, and nothing else."""
    own, found = set(weights), []
    for node in nodes:
        if any(value in others for value in node.inputs):
            others.update(node.outputs)
        elif any(value in own for value in node.inputs):
            own.update(node.outputs)
            found.append(node)
    return found


def _below(nodes: Iterable[ir.Node], values: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that depend on any of the values."""
    seen, found = set(values), []
    for node in nodes:
        if any(value in seen for value in node.inputs):
            seen.update(node.outputs)
            found.append(node)
    return found


def _above(nodes: Sequence[ir.Node], values: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that any of the values depends on."""
    wanted, found = set(values), []
    for node in reversed(nodes):
        if any(value in wanted for value in node.outputs):
            wanted.update(value for value in node.inputs if value is not None)
            found.append(node)
    return found


def _without(nodes: Iterable[ir.Node], others: Iterable[ir.Node]) -> list[ir.Node]:
    left_out = set(others)
    return [node for node in nodes if node not in left_out]


def _taken(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    return list(dict.fromkeys(value for node in nodes for value in node.inputs if value is not None))


def _given(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]


class PartsBuilder:
    """Writes the parts of a body into a graph; each method may be called several times, for different rows.

    Args:
        w: Where the nodes that all pairs share are written.
        parts: The body.
        indices: (N, k) or (N,), the chosen experts.
        shared: The graph's values for the body's shared inputs.
    """

    def __init__(
        self, w: GraphBuilder, parts: BodyParts, indices: ir.Value, shared: Sequence[ir.Value]
    ) -> None:
        self._parts = parts
        self._indices = indices
        self._known = dict(zip(parts.shared, shared, strict=True))
        for value in parts.body.initializers.values():
            self._known[value] = _copied(w, value)
        _write_nodes(w, parts.common, self._known)

    def prepared(self, w: GraphBuilder, weights: Sequence[ir.Value]) -> list[ir.Value]:
        """The weights as the core takes them, from those of one expert, or from stacks for a body with a batch axis."""
        known = {**self._known, **dict(zip(self._parts.weights, weights, strict=True))}
        _write_nodes(w, self._parts.prepared, known)
        return [known[value] for value in self._parts.ready]

    def prologue(self, w: GraphBuilder, token: ir.Value, slot: ir.Value) -> list[ir.Value]:
        """The row values that the core takes, for the given pairs."""
        known = self._with_rows(token, slot)
        _write_nodes(w, _needed(self._parts.prologue, self._parts.entering), known)
        return [known[value] for value in self._parts.entering]

    def core(
        self, w: GraphBuilder, entering: Sequence[ir.Value], expert: ir.Value, ready: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """What the expert computes from the row values.

        Args:
            w: Where to write.
            entering: The row values.
            expert: The expert's number, (1,), or (B, 1) for a body with a batch axis.
            ready: Its weights, as `prepared` gives them.
        """
        known = dict(self._known)
        known.update(zip(self._parts.entering, entering, strict=True))
        known.update(zip(self._parts.ready, ready, strict=True))
        known[self._parts.body.inputs[EXPERT]] = expert
        _write_nodes(w, self._parts.core, known)
        return [known[value] for value in self._parts.leaving]

    def epilogue(
        self,
        w: GraphBuilder,
        leaving: Sequence[ir.Value],
        token: ir.Value,
        slot: ir.Value,
        lead: Sequence[int] | None = None,
    ) -> ir.Value:
        """The rows of the result, from what the core gave for the same pairs.

        Args:
            w: Where to write.
            leaving: What the core gave.
            token: The token of each pair.
            slot: The slot of each pair.
            lead: If these are all pairs, token by token: their shape, with -1 for S. Then a value (N, k, ...) that the
                body indexes by token and slot is only reshaped.
        """
        known = self._with_rows(token, slot)
        known.update(zip(self._parts.leaving, leaving, strict=True))
        wanted = [*_taken(self._parts.epilogue), self._parts.body.outputs[0]]
        needed = _needed(self._parts.prologue, wanted)
        for node in needed if lead is not None else ():
            source = known.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
            if source is not None and source.shape is not None and self._picks_by_pair(node, source):
                rest = [size if isinstance(size, int) else None for size in source.shape[2:]]
                known[node.outputs[0]] = with_lead(w, source, lead or (), rest)
        _write_nodes(w, [node for node in needed if node.outputs[0] not in known], known)
        _write_nodes(w, self._parts.epilogue, known)
        return known[self._parts.body.outputs[0]]

    def _picks_by_pair(self, node: ir.Node, source: ir.Value) -> bool:
        """Whether a node is `source[token, slot]`, and `source` has exactly one entry for each pair."""
        sizes, pairs = source.shape, self._indices.shape
        if node.op_type != "GatherND" or sizes is None or pairs is None or len(pairs) != 2:
            return False
        index = node.inputs[1].producer() if node.inputs[1] is not None else None
        if index is None or index.op_type != "Concat" or tuple(sizes[:2]) != tuple(pairs):
            return False
        inputs = self._parts.body.inputs
        return [_unsqueezed(value) for value in index.inputs] == [inputs[TOKEN], inputs[SLOT]]

    def _with_rows(self, token: ir.Value, slot: ir.Value) -> dict[ir.Value, ir.Value]:
        inputs = self._parts.body.inputs
        return {**self._known, inputs[TOKEN]: token, inputs[SLOT]: slot}


def _needed(nodes: Sequence[ir.Node], values: Iterable[ir.Value]) -> list[ir.Node]:
    return list(reversed(_above(nodes, values)))


def _copied(w: GraphBuilder, value: ir.Value) -> ir.Value:
    """Write a constant of another graph into this one."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    few = array.dtype == np.int64 and array.ndim == 1 and array.size <= _FEW
    return w.constant(array, None if few else value.name)


def _write_nodes(w: GraphBuilder, nodes: Iterable[ir.Node], known: dict[ir.Value, ir.Value]) -> None:
    """Write copies of another graph's nodes.

    Args:
        w: Where to write.
        nodes: The nodes, in graph order.
        known: Values of the other graph → values of this one; the nodes' outputs are added.

    Raises:
        NotExportableError: A node holds a graph of its own.
    """
    for node in nodes:
        if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            raise NotExportableError(
                f"an expert holds control flow of its own ({node.op_type})", code=Code.EXPERT_BODY
            )
        made = w.many(
            node.op_type,
            *(known[value] if value is not None else None for value in node.inputs),
            outputs=len(node.outputs),
            domain=node.domain,
            **dict[str, Any](node.attributes),
        )
        known.update(zip(node.outputs, made, strict=True))
