"""Expand an outlined MoE block one expert at a time: `slices` and `loop`.

See docs/experts.md for the forms and when each is chosen; `experts/batched` has the others.
Letters as in `experts/sorting`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moe_export.export.experts.body import Experts
from moe_export.export.experts.body_parts import BodyParts, PartsBuilder
from moe_export.export.experts.sorting import (
    INT64,
    Sorted,
    apart,
    combine,
    every_pair,
    known_sizes,
    sort_by_expert,
)
from moe_export.export.experts.weights import ExpertWeights, Weight
from moe_export.graph_builder import GraphBuilder


@dataclass(frozen=True)
class Opaque:
    """What an opaque node stands for, in terms of the graph around it.

    Attributes:
        indices: (N, k) or (N,) int64, the chosen experts.
        shared: Values that every expert reads.
        weights: For each weight of the body its E tensors, or one stack (E, ...) of them.
        parts: The ONNX of one expert.
        batched: Makes the ONNX of several experts at once: pairs (B, R), weights (B, ...) → rows (B, R, H).
        count: E.
        slots: k.
        hidden: The sizes of a row of the result; None for one that is free.
        opset: The graph's opset.
        meaning: What was recognised.
        valid: Bool, of the shape of the indices: the pairs that count; None if all do.
    """

    indices: ir.Value
    shared: Sequence[ir.Value]
    weights: Sequence[Weight]
    parts: BodyParts
    batched: Callable[[], BodyParts]
    count: int
    slots: int
    hidden: Sequence[int | None]
    opset: int
    meaning: Experts
    valid: ir.Value | None = None


def guarded(w: GraphBuilder, block: Opaque) -> Opaque:
    """The block with indices that are all in range, and `valid` for the pairs that count.

    A pair whose index names no expert adds nothing, just as no iteration of a loop over the experts takes it.
    """
    indices = block.indices
    zero, count = (w.op("CastLike", w.scalar(number), indices) for number in (0, block.count))
    if block.meaning.wraps:
        indices = w.op(
            "Where", w.op("Less", indices, zero), w.op("Add", indices, count), indices, name="wrapped"
        )
    valid = w.op("And", w.op("GreaterOrEqual", indices, zero), w.op("Less", indices, count), name="valid")
    safe = w.op("Where", valid, indices, zero)
    safe.shape, safe.type = block.indices.shape, block.indices.type
    return dataclasses.replace(block, indices=safe, valid=valid)


Lowering = Callable[[GraphBuilder, Opaque], ir.Value]


def slices(w: GraphBuilder, block: Opaque) -> ir.Value:
    """Each expert computes its part of the sorted pairs, with its own weights, which are not copied into a stack."""
    return _sorted(w, block, slices_of)


def _sorted(w: GraphBuilder, block: Opaque, compute: Callable[..., list[ir.Value]]) -> ir.Value:
    """Sort the pairs by expert, let `compute` (`slices_of` or `loop_of`) run the experts, and combine the results."""
    pairs = sort_by_expert(w, block.indices, block.count, block.slots)
    builder = PartsBuilder(w, block.parts, block.indices, block.shared)
    rows = compute(w, block, builder, builder.prologue(w, pairs.token, pairs.slot), pairs)
    return combine_in_order(w, block, builder, rows, pairs.positions)


def slices_of(
    w: GraphBuilder,
    block: Opaque,
    builder: PartsBuilder,
    entering: Sequence[ir.Value],
    pairs: Sorted,
    numbers: Sequence[int] | None = None,
) -> list[ir.Value]:
    """What the experts' cores give for rows (P, ...) that are sorted by expert; each computes its own part of them.

    Args:
        w: Where to write.
        block: The block of these experts.
        builder: Writes the parts of its body.
        entering: The rows that enter the core.
        pairs: How they are sorted.
        numbers: The numbers that the bodies get for their experts; 0, 1, ... by default.
    """
    parts = [w.many("Split", value, pairs.counts, outputs=block.count, axis=0) for value in entering]
    ready = ExpertWeights(w, block.weights, block.count, block.opset).apart(block.parts, builder)
    leaving = []
    for expert, number in enumerate(range(block.count) if numbers is None else numbers):
        inner = w.inner(str(expert))
        mine = [column[expert] for column in parts]
        leaving.append(builder.core(inner, mine, w.ints(number), ready[expert]))
        w.take(inner)
    return [w.op("Concat", *column, axis=0) for column in zip(*leaving, strict=True)]


def combine_in_order(
    w: GraphBuilder,
    block: Opaque,
    builder: PartsBuilder,
    rows: Sequence[ir.Value],
    positions: ir.Value,
    lead: Sequence[int] = (-1,),
) -> ir.Value:
    """The result (N, H), from what the experts gave.

    Args:
        w: Where to write.
        block: The block that is written.
        builder: Writes the parts of its body.
        rows: What the core gave, pair by pair in the experts' order.
        positions: (S,) the row of each pair in that order.
        lead: The axes that the body has for its pairs: (-1,), or (1, -1) for a body with a batch axis.
    """
    back = [w.op("Gather", value, positions, axis=0) for value in rows]
    pairs = every_pair(w, positions, "every_pair")
    if len(lead) > 1:
        back = [w.op("Unsqueeze", value, w.ints(0)) for value in back]
        pairs = w.op("Unsqueeze", pairs, w.ints(0))
    token, slot = apart(w, pairs, block.slots)
    return combine(w, builder.epilogue(w, back, token, slot, lead), block.slots, block.hidden, block.valid)


def loop(w: GraphBuilder, block: Opaque) -> ir.Value:
    """A `Loop` over the experts that were hit; each iteration takes its weights from the stack."""
    return _sorted(w, block, loop_of)


def loop_of(
    w: GraphBuilder,
    block: Opaque,
    builder: PartsBuilder,
    entering: Sequence[ir.Value],
    pairs: Sorted,
    numbers: Sequence[int] | None = None,
) -> list[ir.Value]:
    """The same as `slices_of`, as a `Loop` with one iteration for each expert that has rows."""
    weights = ExpertWeights(w, block.weights, block.count, block.opset)
    stacks = weights.stacked(block.parts)
    called = None if numbers is None else w.constant(np.array(numbers, dtype=np.int64), "numbers")
    hits = w.op("Squeeze", w.op("NonZero", pairs.counts), w.ints(0), name="hits")
    iteration = Iteration(w.inner("iteration"), block.parts.leaving)
    inner = iteration.builder
    expert = inner.op("Gather", hits, iteration.number, axis=0, name="expert")
    bounds = [
        inner.op("Unsqueeze", inner.op("Gather", value, expert), w.ints(0))
        for value in (pairs.starts, pairs.ends)
    ]
    mine = [inner.op("Slice", value, *bounds, w.ints(0)) for value in entering]
    ready = [inner.op("Gather", stack, expert, axis=0) for stack in stacks]
    ready = ready if weights.known else builder.prepared(inner, ready)
    number = expert if called is None else inner.op("Gather", called, expert)
    body = iteration.graph(builder.core(inner, mine, inner.op("Unsqueeze", number, w.ints(0)), ready))
    always = w.constant(np.array(True), "true")
    starts = [no_rows(w, value, pairs.token) for value in block.parts.leaving]
    parts = w.many("Loop", w.op("Size", hits), always, *starts, outputs=len(starts), body=body)
    return [w.op("ConcatFromSequence", value, axis=0) for value in parts]


def no_rows(w: GraphBuilder, value: ir.Value, pairs: ir.Value) -> ir.Value:
    """A sequence that starts with an empty tensor of rows: there may be no token at all, and no iteration.

    The empty tensor is cut out of `pairs` (S,), which is only known at run time: a constant would be folded, and
    constant folders do not support sequences.
    """
    assert value.shape is not None
    assert value.dtype is not None
    none = w.op("Cast", w.op("Slice", pairs, w.ints(0), w.ints(0), w.ints(0)), to=value.dtype)
    sizes = known_sizes(value.shape[1:])
    empty = w.op("SequenceConstruct", w.op("Reshape", none, w.ints(0, *sizes), allowzero=1))
    empty.type = ir.SequenceType(ir.TensorType(value.dtype))
    return empty


class Iteration:
    """The body of a `Loop` that appends the rows of one expert to those of the experts before it.

    Attributes:
        builder: Where the body's nodes are written.
        number: The number of the iteration, () int64.
    """

    def __init__(self, builder: GraphBuilder, leaving: Sequence[ir.Value]) -> None:
        name = builder.prefix
        self.builder = builder
        self.number = ir.Value(name=f"{name}.number", type=ir.TensorType(INT64), shape=ir.Shape(()))
        self._going = ir.Value(name=f"{name}.going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(()))
        self._sequences = []
        for index, value in enumerate(leaving):
            assert value.dtype is not None
            rows_type = ir.SequenceType(ir.TensorType(value.dtype))
            self._sequences.append(ir.Value(name=f"{name}.before_{index}", type=rows_type))

    def graph(self, rows: Sequence[ir.Value]) -> ir.Graph:
        """The finished body; `rows` are those of this iteration."""
        longer = []
        for sequence, value in zip(self._sequences, rows, strict=True):
            longer.append(self.builder.op("SequenceInsert", sequence, value))
            longer[-1].type = sequence.type
        going = self.builder.op("Identity", self._going)
        going.type = self._going.type
        inputs = [self.number, self._going, *self._sequences]
        return ir.Graph(inputs, [going, *longer], nodes=self.builder.nodes, name="expert")
