"""Pieces of ONNX that the experts' lowerings share: counting and sorting pairs, writing nodes, evaluating them.

Letters: N tokens, k slots, S = N*k pairs, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from moe_export.errors import NotExportableError
from moe_export.export.weights.recipe import Recipe, RecipeTensor

INT64 = ir.DataType.INT64


class Builder:
    """Writes nodes, with constants as initializers that are made once.

    Attributes:
        nodes: What was written, in order.
        graph: The graph that constants go to.
    """

    def __init__(
        self, graph: ir.Graph, prefix: str, constants: dict[tuple[int | None, ...], ir.Value] | None = None
    ) -> None:
        self._tape = tape.Tape()
        self._written: list[ir.Node] = []
        self.graph = graph
        self.prefix = prefix
        self._constants: dict[tuple[int | None, ...], ir.Value] = {} if constants is None else constants

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._written

    def take(self, other: Builder) -> None:
        """Put the nodes of another builder behind those of this one."""
        self._written += other.nodes

    def inner(self, prefix: str) -> Builder:
        """A builder for a subgraph: nodes of its own, the same constants."""
        return Builder(self.graph, f"{self.prefix}.{prefix}", self._constants)

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        domain: str = "",
        **attributes: object,
    ) -> ir.Value:
        """Write one node with one output."""
        value = self._tape.op(kind, list(inputs), attributes, domain=domain)  # type: ignore[arg-type]
        value.name = f"{self.prefix}.{name or f'{kind}_{len(self._written)}'}"
        self._written.append(value.producer())  # type: ignore[arg-type]
        return value

    def many(
        self, kind: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: object
    ) -> Sequence[ir.Value]:
        """Write one node with several outputs."""
        given: dict[str, Any] = dict(attributes)
        values = self._tape.op_multi_out(kind, list(inputs), given, num_outputs=outputs, domain=domain)
        for index, value in enumerate(values):
            value.name = f"{self.prefix}.{kind}_{len(self._written)}_{index}"
        self._written.append(values[0].producer())  # type: ignore[arg-type]
        return values

    def ints(self, *numbers: int) -> ir.Value:
        """A constant (n,) of int64."""
        if numbers not in self._constants:
            name = f"{self.prefix}.ints_{'_'.join(map(str, numbers[:4])).replace('-', 'm')}_{len(self._constants)}"
            self._constants[numbers] = self.constant(np.array(numbers, dtype=np.int64), name)
        return self._constants[numbers]

    def scalar(self, number: int) -> ir.Value:
        """A constant () of int64."""
        if (None, number) not in self._constants:
            name = f"{self.prefix}.scalar_{number}"
            self._constants[None, number] = self.constant(np.array(number, dtype=np.int64), name)
        return self._constants[None, number]

    def copied(self, value: ir.Value) -> ir.Value:
        """A constant of another graph, in this one."""
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.dtype == np.int64 and array.ndim == 1 and array.size <= 8:
            return self.ints(*array.tolist())
        return self.constant(array, f"{self.prefix}.{value.name}")

    def constant(self, array: np.ndarray | Recipe, name: str) -> ir.Value:
        """An initializer of the main graph."""
        tensor = RecipeTensor(array, name) if isinstance(array, Recipe) else ir.tensor(array, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value


@dataclass(frozen=True)
class Counted:
    """How the pairs spread over the experts.

    Attributes:
        flat: (S,) the expert of each pair, token by token.
        rank: (S,) how many pairs of the same expert stand before each.
        counts: (E,) pairs of each expert.
    """

    flat: ir.Value
    rank: ir.Value
    counts: ir.Value


def count_by_expert(w: Builder, indices: ir.Value, count: int) -> Counted:
    """Count pairs by expert: one-hot and a cumulative sum, the same order on every machine.

    Args:
        w: Where to write.
        indices: (N, k) or (N,).
        count: E.
    """
    flat = w.op("Reshape", indices, w.ints(-1))
    column = w.op("Unsqueeze", flat, w.ints(1))
    experts = w.constant(np.arange(count, dtype=np.int64), f"{w.prefix}.experts")
    hot = w.op("Cast", w.op("Equal", column, experts), to=ir.DataType.INT32)  # (S, E)
    ranks = w.op("CumSum", hot, w.scalar(0), exclusive=1)
    rank = w.op("Squeeze", w.op("GatherElements", ranks, column, axis=1), w.ints(1))
    counts = w.op("ReduceSum", hot, w.ints(0), keepdims=0)
    return Counted(
        flat=flat,
        rank=w.op("Cast", rank, to=INT64, name="rank"),
        counts=w.op("Cast", counts, to=INT64, name="counts"),
    )


def every_pair(w: Builder, values: ir.Value, name: str = "pairs") -> ir.Value:
    """The numbers 0 to S - 1, for a value (S,)."""
    return w.op("Range", w.scalar(0), w.op("Size", values), w.scalar(1), name=name)


@dataclass(frozen=True)
class Sorted:
    """Pairs in the order of their experts.

    Attributes:
        token, slot: (S,) of the pairs, sorted by expert, by token within an expert.
        counts, starts, ends: (E,) number of pairs of each expert, and where its part begins and ends.
        positions: (S,) where each pair went, in the order of the tokens.
    """

    token: ir.Value
    slot: ir.Value
    counts: ir.Value
    starts: ir.Value
    ends: ir.Value
    positions: ir.Value


def sort_by_expert(w: Builder, indices: ir.Value, count: int, slots: int) -> Sorted:
    """Sort pairs by expert, by counting.

    One-hot, cumulative sum, unique positions, one scatter without a reduction: no TopK (TensorRT stops at
    K = 3840), no NonZero, and the same order on every machine.

    Args:
        w: Where to write.
        indices: (N, k) or (N,).
        count: E.
        slots: k.
    """
    counted = count_by_expert(w, indices, count)
    ends = w.op("CumSum", counted.counts, w.scalar(0), name="ends")
    starts = w.op("Sub", ends, counted.counts, name="starts")
    positions = w.op("Add", w.op("Gather", starts, counted.flat), counted.rank, name="positions")
    pairs = every_pair(w, counted.flat)
    order = w.op("ScatterElements", pairs, positions, pairs, axis=0, name="order")
    token, slot = apart(w, order, slots)
    return Sorted(token, slot, counted.counts, starts, ends, positions)


def apart(w: Builder, pairs: ir.Value, slots: int) -> tuple[ir.Value, ir.Value]:
    """Token and slot of pairs that are numbered token by token."""
    if slots == 1:
        return pairs, w.op("Sub", pairs, pairs, name="slot")
    return w.op("Div", pairs, w.ints(slots), name="token"), w.op("Mod", pairs, w.ints(slots), name="slot")


def known_sizes(sizes: Iterable[object]) -> list[int]:
    """The sizes of a row, where a form has to know them.

    Raises:
        NotExportableError: One of them is free: the height of an image.
    """
    found = list(sizes)
    if not all(isinstance(size, int) for size in found):
        raise NotExportableError(
            "this form of the experts needs rows of fixed sizes, and theirs are free",
            hint="choose --experts slices, or fix the sizes with --static",
        )
    return [size for size in found if isinstance(size, int)]


def with_lead(w: Builder, value: ir.Value, lead: Sequence[int], sizes: Sequence[int | None]) -> ir.Value:
    """A value (..., *sizes) with other axes in front.

    Args:
        w: Where to write.
        value: Any leading axes, then a row.
        lead: The axes in front of the result; one of them may be -1.
        sizes: Of a row; None where one is free.
    """
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        return w.op("Reshape", value, w.ints(*lead, *known))
    shape = w.op("Concat", w.ints(*lead), w.op("Shape", value, start=-len(sizes)), axis=0)
    return w.op("Reshape", value, shape)


def combine(
    w: Builder, rows: ir.Value, slots: int, hidden: Sequence[int | None], valid: ir.Value | None = None
) -> ir.Value:
    """Rows of all S pairs, token by token → their sums (N, H) over the slots of each token.

    Args:
        w: Where to write.
        rows: S rows of H, in any shape.
        slots: k.
        hidden: H; None where a size is free.
        valid: (N, k) or (N,), the pairs that count; None for all.
    """
    by_token = with_lead(w, rows, (-1, slots) if slots > 1 else (-1,), hidden)
    if valid is not None:
        columns = w.op("Reshape", valid, w.ints(-1, *[slots] * (slots > 1), *[1] * len(hidden)))
        by_token = w.op("Where", columns, by_token, w.op("CastLike", w.scalar(0), by_token))
    return w.op("ReduceSum", by_token, w.ints(1), keepdims=0, name="combined") if slots > 1 else by_token


def write_nodes(
    w: Builder, nodes: Iterable[ir.Node], known: dict[ir.Value, ir.Value], metadata: Mapping[str, str]
) -> None:
    """Write nodes of another graph once more.

    Args:
        w: Where to write.
        nodes: In order.
        known: Values of the other graph → values of this one; what the nodes give is added.
        metadata: For the nodes that are written.

    Raises:
        NotExportableError: A node holds a graph of its own.
    """
    for node in nodes:
        if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            raise NotExportableError(f"an expert holds control flow of its own ({node.op_type})")
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        made = w.many(
            node.op_type,
            *(known[value] if value is not None else None for value in node.inputs),
            outputs=len(node.outputs),
            **attributes,
        )
        made[0].producer().metadata_props.update(metadata)  # type: ignore[union-attr]
        known.update(zip(node.outputs, made, strict=True))
