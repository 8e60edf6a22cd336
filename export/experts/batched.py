"""Expand an outlined MoE block with the experts as a batch axis: `dense`, `gather` and `blocks`.

These take a body for B experts at once: pairs (B, R), weights (B, ...) → rows (B, R, H). None of their shapes depends
on the data, and none needs NonZero, TopK or a scatter with a reduction. Letters as in `experts/sorting`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moe_export.export.experts.body_parts import SLOT, PartsBuilder
from moe_export.export.experts.one_at_a_time import Opaque, combine_in_order
from moe_export.export.experts.sorting import apart, combine, count_by_expert, every_pair, with_lead
from moe_export.export.experts.weights import ExpertWeights
from moe_export.graph_builder import GraphBuilder

ROWS = 8
"""The fewest rows of a block: with fewer, a small batch of tokens would not be worth gathering that many weights."""

_BROADCASTS = {
    "MatMul", "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "Cast", "Sigmoid", "Tanh", "Erf", "Exp", "Log",
    "Sqrt", "Relu", "LeakyRelu", "Elu", "Gelu", "Softplus", "HardSigmoid", "HardSwish", "Clip", "Neg", "Abs",
    "Reciprocal", "Identity", "Softmax", "LayerNormalization", "RMSNormalization", "Swish", "Mish", "Selu", "Celu",
}  # fmt: skip
"""Operators that broadcast a first axis of size 1 to any size."""


def dense(w: GraphBuilder, block: Opaque) -> ir.Value:
    """Every expert computes every token, and a mask selects: E / k times the work, in one matrix product a layer."""
    parts = block.batched()
    builder = PartsBuilder(w, parts, block.indices, block.shared)
    ready = ExpertWeights(w, block.weights, block.count, block.opset).batched(parts, builder)
    # If a token may have an expert twice, or none, a row is a pair rather than a token.
    by_pair = block.valid is not None or (block.slots > 1 and not _distinct(block.indices))
    choices = w.op("Reshape", block.indices, w.ints(1, -1, 1 if by_pair else block.slots))
    every_expert = w.constant(np.arange(block.count), "experts")
    hot = w.op(
        "Cast", w.op("Equal", choices, w.op("Reshape", every_expert, w.ints(-1, 1, 1))), to=ir.DataType.INT32
    )
    mask = w.op("Cast", w.op("ReduceMax", hot, w.ints(2), keepdims=0), to=ir.DataType.BOOL, name="mask")
    shape = w.op("Shape", mask)  # (E, rows)
    row = w.op("Range", w.scalar(0), w.op("Gather", shape, w.scalar(1)), w.scalar(1), name="row")
    if by_pair:
        token, slot = apart(w, row, block.slots)
        slot = w.op("Expand", slot, shape)
    else:
        token, slot = row, w.op("ArgMax", hot, axis=2, keepdims=0, name="slot")
    every_token = w.op("Expand", token, shape, name="token")
    # Each expert needs rows of its own, (E, rows), if its core does not broadcast, or if they depend on the slot.
    own_rows = any(node.op_type not in _BROADCASTS for node in parts.core)
    own_rows = own_rows or any(parts.body.inputs[SLOT] in node.inputs for node in parts.prologue)
    entering = builder.prologue(w, every_token if own_rows else w.op("Unsqueeze", token, w.ints(0)), slot)
    leaving = builder.core(w, entering, w.op("Unsqueeze", every_expert, w.ints(1)), ready)
    result = builder.epilogue(w, leaving, every_token, slot)
    masked = w.op("Unsqueeze", mask, w.ints(*range(2, 2 + len(block.hidden))))
    nothing = w.op("CastLike", w.scalar(0), result)
    summed = w.op("ReduceSum", w.op("Where", masked, result, nothing), w.ints(0), keepdims=0, name="summed")
    return combine(w, summed, block.slots, block.hidden, block.valid) if by_pair else summed


def _distinct(indices: ir.Value) -> bool:
    """Whether a token is known to have each expert at most once, as after `TopK`."""
    producer = indices.producer()
    while producer is not None and producer.op_type in ("Identity", "Cast"):
        (indices,) = producer.inputs  # type: ignore[assignment]
        producer = indices.producer()
    return producer is not None and producer.op_type == "TopK"


def gather(w: GraphBuilder, block: Opaque) -> ir.Value:
    """Each pair gathers its expert's weights: nothing is sorted, which suits a token or two."""
    parts = block.batched()
    builder = PartsBuilder(w, parts, block.indices, block.shared)
    flat = w.op("Reshape", block.indices, w.ints(-1))
    stacks = ExpertWeights(w, block.weights, block.count, block.opset).batched(parts, builder)
    ready = [w.op("Gather", stack, flat, axis=0) for stack in stacks]
    pairs = w.op("Unsqueeze", every_pair(w, flat), w.ints(1))  # (S, 1)
    token, slot = apart(w, pairs, block.slots)
    expert = w.op("Unsqueeze", flat, w.ints(1))
    leaving = builder.core(w, builder.prologue(w, token, slot), expert, ready)
    return combine(
        w, builder.epilogue(w, leaving, token, slot, (-1, 1)), block.slots, block.hidden, block.valid
    )


def blocks(w: GraphBuilder, block: Opaque) -> ir.Value:
    """Pairs sorted by expert into B blocks of T rows, each of one expert, whose weights it gathers.

    T = max(ROWS, ceil(S / E)), so that min(S, E) + (S - min(S, E)) / ROWS blocks are enough whatever the routing, and
    so are 2 E: the smaller is B. The shape follows from N alone, with at most twice the work and twice the weights. An
    engine that bounds B and T separately finds B T <= 2 S + 2 E ROWS.
    """
    parts = block.batched()
    builder = PartsBuilder(w, parts, block.indices, block.shared)
    counted = count_by_expert(w, block.indices, block.count)
    size = w.op("Size", counted.flat)
    experts, one = w.scalar(block.count), w.scalar(1)
    rows = w.op(
        "Max", w.scalar(ROWS), w.op("Div", w.op("Add", size, w.scalar(block.count - 1)), experts), name="rows"
    )
    least = w.op("Min", size, experts)
    most = w.op("Add", least, w.op("Div", w.op("Sub", size, least), w.scalar(ROWS)))
    number = w.op("Min", most, w.scalar(2 * block.count), name="blocks")
    needed = w.op("Div", w.op("Add", counted.counts, w.op("Sub", rows, one)), rows)  # (E,)
    ends = w.op("CumSum", needed, w.scalar(0))
    starts = w.op("Mul", w.op("Sub", ends, needed), rows)
    positions = w.op("Add", w.op("Gather", starts, counted.flat), counted.rank, name="positions")
    places = w.op("Expand", w.scalar(0), w.op("Unsqueeze", w.op("Mul", number, rows), w.ints(0)))
    order = w.op("ScatterElements", places, positions, every_pair(w, counted.flat), axis=0)
    row_size = w.op("Unsqueeze", rows, w.ints(0))
    shape = w.op("Concat", w.op("Unsqueeze", number, w.ints(0)), row_size, axis=0)
    token, slot = apart(w, w.op("Reshape", order, shape, allowzero=1, name="order"), block.slots)
    expert = _expert_of_block(w, number, ends, block.count)
    stacks = ExpertWeights(w, block.weights, block.count, block.opset).batched(parts, builder)
    ready = [w.op("Gather", stack, expert, axis=0) for stack in stacks]
    leaving = builder.core(w, builder.prologue(w, token, slot), w.op("Unsqueeze", expert, w.ints(1)), ready)
    joined = [_joined(w, value, inner) for value, inner in zip(leaving, parts.leaving, strict=True)]
    return combine_in_order(w, block, builder, joined, positions, (1, -1))


def _expert_of_block(w: GraphBuilder, number: ir.Value, ends: ir.Value, count: int) -> ir.Value:
    """(B,) the expert of each block: how many experts' blocks all come before it; the last one for unused blocks."""
    every = w.op("Unsqueeze", w.op("Range", w.scalar(0), number, w.scalar(1)), w.ints(1))
    passed = w.op("Cast", w.op("LessOrEqual", ends, every), to=ir.DataType.INT32)
    expert = w.op("Cast", w.op("ReduceSum", passed, w.ints(1), keepdims=0), to=ir.DataType.INT64)
    return w.op("Min", expert, w.scalar(count - 1), name="expert")


def _joined(w: GraphBuilder, value: ir.Value, inner: ir.Value) -> ir.Value:
    """(B, R, ...) → (B * R, ...)."""
    assert inner.shape is not None
    return with_lead(w, value, (-1,), [size if isinstance(size, int) else None for size in inner.shape[2:]])
