"""Pieces of ONNX that the experts' lowerings share: sorting pairs by expert, writing out a body, stacking weights.

Letters: N tokens, k slots, S = N*k pairs, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

INT64 = ir.DataType.INT64


class Writer:
    """Writes nodes, with constants as initializers that are made once.

    Attributes:
        nodes: What was written, in order.
        graph: The graph that constants go to.
    """

    def __init__(
        self, graph: ir.Graph, prefix: str, constants: dict[tuple[int, ...], ir.Value] | None = None
    ) -> None:
        self._tape = tape.Tape()
        self._written: list[ir.Node] = []
        self.graph = graph
        self.prefix = prefix
        self._constants = {} if constants is None else constants

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._written

    def take(self, other: Writer) -> None:
        """Put the nodes of another writer behind those of this one."""
        self._written += other.nodes

    def inner(self, prefix: str) -> Writer:
        """A writer for a subgraph: nodes of its own, the same constants."""
        return Writer(self.graph, f"{self.prefix}.{prefix}", self._constants)

    def op(
        self, kind: str, *inputs: ir.Value | None, name: str | None = None, **attributes: object
    ) -> ir.Value:
        """Write one node with one output."""
        value = self._tape.op(kind, list(inputs), attributes)  # type: ignore[arg-type]
        value.name = f"{self.prefix}.{name or f'{kind}_{len(self._written)}'}"
        self._written.append(value.producer())  # type: ignore[arg-type]
        return value

    def many(
        self, kind: str, *inputs: ir.Value | None, outputs: int, **attributes: object
    ) -> Sequence[ir.Value]:
        """Write one node with several outputs."""
        values = self._tape.op_multi_out(kind, list(inputs), attributes, num_outputs=outputs)  # type: ignore[arg-type]
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

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """An initializer of the main graph."""
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value


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


def sort_by_expert(w: Writer, indices: ir.Value, count: int, slots: int) -> Sorted:
    """Sort pairs by expert, by counting.

    One-hot, cumulative sum, unique positions, one scatter without a reduction: no TopK (TensorRT stops at
    K = 3840), no NonZero, and the same order on every machine.

    Args:
        w: Where to write.
        indices: (N, k) or (N,).
        count: E.
        slots: k.
    """
    flat = w.op("Reshape", indices, w.ints(-1))
    experts = w.constant(np.arange(count, dtype=np.int64), f"{w.prefix}.experts")
    chosen = w.op("Equal", w.op("Unsqueeze", flat, w.ints(1)), experts)
    hot = w.op("Cast", chosen, to=INT64)  # (S, E)
    ranks = w.op("CumSum", hot, w.constant(np.array(0, dtype=np.int64), f"{w.prefix}.axis_0"))
    counts = w.op("ReduceSum", hot, w.ints(0), keepdims=0, name="counts")
    ends = w.op("CumSum", counts, w.constant(np.array(0, dtype=np.int64), f"{w.prefix}.axis"), name="ends")
    starts = w.op("Sub", ends, counts, name="starts")
    rank = w.op(
        "Squeeze", w.op("GatherElements", ranks, w.op("Unsqueeze", flat, w.ints(1)), axis=1), w.ints(1)
    )
    positions = w.op("Sub", w.op("Add", w.op("Gather", starts, flat), rank), w.ints(1), name="positions")
    zero, one = (w.constant(np.array(n, dtype=np.int64), f"{w.prefix}.scalar_{n}") for n in (0, 1))
    pairs = w.op("Range", zero, w.op("Size", flat), one)
    order = w.op("ScatterElements", pairs, positions, pairs, axis=0, name="order")
    return Sorted(
        token=w.op("Div", order, w.ints(slots), name="token"),
        slot=w.op("Mod", order, w.ints(slots), name="slot"),
        counts=counts,
        starts=starts,
        ends=ends,
        positions=positions,
    )


def combine(w: Writer, rows: ir.Value, positions: ir.Value, slots: int, hidden: Sequence[int]) -> ir.Value:
    """Rows (S, H) in the order of the experts → their sums (N, H) over the slots of each token."""
    back = w.op("Gather", rows, positions, axis=0)
    if slots == 1:
        return back
    apart = w.op("Reshape", back, w.ints(-1, slots, *hidden))
    return w.op("ReduceSum", apart, w.ints(1), keepdims=0, name="combined")


def write_body(
    w: Writer, body: ir.Graph, inputs: Sequence[ir.Value], metadata: Mapping[str, str]
) -> ir.Value:
    """Write the nodes of a body once more, on the given inputs.

    Raises:
        ValueError: The body holds control flow of its own.
    """
    mapping: dict[ir.Value, ir.Value] = dict(zip(body.inputs, inputs, strict=True))
    for value in body.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.dtype == np.int64 and array.ndim == 1 and array.size <= 8:
            mapping[value] = w.ints(*array.tolist())
        else:
            mapping[value] = w.constant(array, f"{w.prefix}.{value.name}")
    for node in body:
        if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            raise ValueError(f"{node.op_type} in an expert")
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        made = w.many(
            node.op_type,
            *(mapping[value] if value is not None else None for value in node.inputs),
            outputs=len(node.outputs),
            **attributes,
        )
        made[0].producer().metadata_props.update(metadata)  # type: ignore[union-attr]
        mapping.update(zip(node.outputs, made, strict=True))
    return mapping[body.outputs[0]]
