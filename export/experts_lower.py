"""Write out what an opaque MoE node means: `slices`, or `loop`.

See docs/experts.md for the forms and when each is chosen. Letters as in `experts_onnx`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moe_export.export.experts_onnx import INT64, Sorted, Writer, combine, sort_by_expert, write_body

SLICES_UP_TO = 64  # experts; above, a graph that grows with them is no longer worth its speed


@dataclass(frozen=True)
class Opaque:
    """An opaque node, taken apart.

    Attributes:
        indices: (N, k) or (N,).
        shared: Values that every expert reads.
        weights: For each weight of the body its E tensors, or one stack (E, ...) of them.
        body: ONNX of one expert: `(token, slot, expert, *shared, *weights) → (R, H)`.
        count: E.
        slots: k.
        hidden: The sizes behind the rows of the result.
    """

    indices: ir.Value
    shared: Sequence[ir.Value]
    weights: Sequence[Sequence[ir.Value] | ir.Value]
    body: ir.Graph
    count: int
    slots: int
    hidden: Sequence[int]
    metadata: Mapping[str, str]


Lowering = Callable[[Writer, Opaque], ir.Value]


def slices(w: Writer, block: Opaque) -> ir.Value:
    """One part of the sorted pairs an expert; each with weights of its own, that are copied nowhere."""
    pairs = sort_by_expert(w, block.indices, block.count, block.slots)
    tokens = w.many("Split", pairs.token, pairs.counts, outputs=block.count, axis=0)
    slots = w.many("Split", pairs.slot, pairs.counts, outputs=block.count, axis=0)
    rows = []
    for expert in range(block.count):
        inner = w.inner(str(expert))
        mine = [_one(inner, weight, expert) for weight in block.weights]
        rows.append(
            write_body(
                inner,
                block.body,
                [tokens[expert], slots[expert], w.ints(expert), *block.shared, *mine],
                block.metadata,
            )
        )
        w.take(inner)
    return combine(w, w.op("Concat", *rows, axis=0), pairs.positions, block.slots, block.hidden)


def _one(w: Writer, weight: Sequence[ir.Value] | ir.Value, expert: int) -> ir.Value:
    if not isinstance(weight, ir.Value):
        return weight[expert]
    if weight.const_value is not None:
        return w.constant(weight.const_value.numpy()[expert], f"{weight.name}.{expert}")
    return w.op("Squeeze", w.op("Slice", weight, w.ints(expert), w.ints(expert + 1), w.ints(0)), w.ints(0))


def loop(w: Writer, block: Opaque) -> ir.Value:
    """A `Loop` over the experts that were hit; each turn takes its weights from the stack."""
    pairs = sort_by_expert(w, block.indices, block.count, block.slots)
    stacks = [_stack(w, weight, index) for index, weight in enumerate(block.weights)]
    hits = w.op("Squeeze", w.op("NonZero", pairs.counts), w.ints(0), name="hits")
    body, dtype = _turn(w, block, pairs, stacks, hits)
    # The sequence starts with no rows: there may be no token at all.
    none = w.constant(np.zeros((0, *block.hidden), dtype.numpy()), f"{w.prefix}.no_rows")
    empty = w.op("SequenceConstruct", none)
    empty.type = ir.SequenceType(ir.TensorType(dtype))
    always = w.constant(np.array(True), f"{w.prefix}.true")
    parts = w.op("Loop", w.op("Size", hits), always, empty, body=body, name="parts")
    return combine(w, w.op("ConcatFromSequence", parts, axis=0), pairs.positions, block.slots, block.hidden)


def _turn(
    w: Writer, block: Opaque, pairs: Sorted, stacks: Sequence[ir.Value], hits: ir.Value
) -> tuple[ir.Graph, ir.DataType]:
    """The body of the `Loop`: the rows of one expert are put behind those of the experts before it."""
    dtype = block.body.outputs[0].dtype
    assert dtype is not None
    rows_type = ir.SequenceType(ir.TensorType(dtype))
    turn = ir.Value(name=f"{w.prefix}.turn", type=ir.TensorType(INT64), shape=ir.Shape(()))
    before = ir.Value(name=f"{w.prefix}.going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(()))
    sequence = ir.Value(name=f"{w.prefix}.before", type=rows_type)
    inner = w.inner("turn")
    expert = inner.op("Gather", hits, turn, axis=0, name="expert")
    bounds = [
        inner.op("Unsqueeze", inner.op("Gather", value, expert), w.ints(0))
        for value in (pairs.starts, pairs.ends)
    ]
    token, slot = (inner.op("Slice", value, *bounds, w.ints(0)) for value in (pairs.token, pairs.slot))
    mine = [inner.op("Gather", stack, expert, axis=0) for stack in stacks]
    number = inner.op("Unsqueeze", expert, w.ints(0))
    rows = write_body(inner, block.body, [token, slot, number, *block.shared, *mine], block.metadata)
    after = inner.op("SequenceInsert", sequence, rows, name="after")
    after.type = rows_type
    going = inner.op("Identity", before)
    going.type = ir.TensorType(ir.DataType.BOOL)
    return ir.Graph([turn, before, sequence], [going, after], nodes=inner.nodes, name="expert"), dtype


def _stack(w: Writer, weight: Sequence[ir.Value] | ir.Value, index: int) -> ir.Value:
    """The weights of all experts as one (E, ...)."""
    if isinstance(weight, ir.Value):
        return weight
    arrays = [value.const_value.numpy() for value in weight if value.const_value is not None]
    if len(arrays) == len(weight):
        return w.constant(np.stack(arrays), f"{w.prefix}.weights_{index}")
    return w.op("Concat", *(w.op("Unsqueeze", value, w.ints(0)) for value in weight), axis=0)


LOWERINGS: dict[str, Lowering] = {"slices": slices, "loop": loop}


def choose(choice: str, count: int) -> str:
    """The lowering that `auto` stands for: slices are the fastest on a CPU, but grow with the experts."""
    if choice != "auto":
        return choice
    return "slices" if count <= SLICES_UP_TO else "loop"
