"""Expand the part of an MoE block that one rank computes: its own experts, on the pairs that chose them.

`slices` and `loop` sort the pairs as the forms of the whole block do (see `experts/one_at_a_time`), with one more bin
behind the experts for pairs of nobody here: no row of these is computed. The other forms have shapes that no data
decide, so they compute every pair and mask what is not theirs.

Letters: N tokens, k slots, S = N*k pairs, E experts of this rank, P pairs of these, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moe_export.errors import Code, NotExportableError
from moe_export.export.experts.body_parts import EXPERT, PartsBuilder
from moe_export.export.experts.choose import LOWERINGS, Lowering
from moe_export.export.experts.one_at_a_time import Opaque, combine_in_order, guarded, loop_of, slices_of
from moe_export.export.experts.sorting import Sorted, known_sizes, sort_by_expert
from moe_export.export.experts.weights import Weight, known_array
from moe_export.export.onnx.recipe_steps import as_tensor, row_of, stacked
from moe_export.graph_builder import GraphBuilder

DOMAIN = "moe_export"
"""Of the nodes that mark exchanges; none is left in a finished graph."""
ONE_AT_A_TIME = ("slices", "loop")


@dataclass(frozen=True)
class Own:
    """The experts of one rank.

    Attributes:
        block: The block with this rank's weights; its `indices` are (N, k) or (N,) of 0 to E - 1 for pairs of this
            rank, and E for all others, which `valid` marks.
        experts: (E,) their numbers among all experts.
    """

    block: Opaque
    experts: tuple[int, ...]


def own_part(w: GraphBuilder, block: Opaque, experts: Sequence[int]) -> Own:
    """A block whose pairs of other ranks name no expert.

    Args:
        w: Where to write.
        block: Of all experts.
        experts: Those of this rank.
    """
    local = np.full(block.count + 1, len(experts), dtype=np.int64)
    local[list(experts)] = np.arange(len(experts))
    indices = w.op("Gather", w.constant(local, "local"), in_range(w, block), axis=0, name="own_expert")
    valid = w.op("Less", indices, w.scalar(len(experts)), name="own_pair")
    for value in (indices, valid):
        value.shape = block.indices.shape
    indices.type, valid.type = ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.BOOL)
    mine = dataclasses.replace(
        block,
        indices=indices,
        valid=valid,
        count=len(experts),
        weights=[of_experts(w, weight, experts, block.opset) for weight in block.weights],
        meaning=dataclasses.replace(block.meaning, count=len(experts), wraps=False),
    )
    return Own(mine, tuple(experts))


def in_range(w: GraphBuilder, block: Opaque) -> ir.Value:
    """The indices of a block as 0 to E - 1, and E where they name no expert: int64, of the same shape."""
    count = w.scalar(block.count)
    indices = w.op("Cast", block.indices, to=ir.DataType.INT64)
    if block.meaning.wraps:
        indices = w.op("Where", w.op("Less", indices, w.scalar(0)), w.op("Add", indices, count), indices)
    inside = w.op("And", w.op("GreaterOrEqual", indices, w.scalar(0)), w.op("Less", indices, count))
    return w.op("Where", inside, indices, count)


def of_experts(w: GraphBuilder, weight: Weight, experts: Sequence[int], opset: int) -> Weight:
    if not isinstance(weight, ir.Value):
        return [weight[expert] for expert in experts]
    array = known_array(weight, opset)
    if array is None:  # computed at run time: every rank computes the stack, and takes its part
        return w.op("Gather", weight, w.ints(*experts), axis=0)
    own = as_tensor(stacked([row_of(array, expert) for expert in experts]))
    return w.constants.add(own, f"{weight.name}.own")


def partial_sum(w: GraphBuilder, form: Lowering, block: Opaque, experts: Sequence[int]) -> ir.Value:
    """What one rank adds to the result (N, H) of a block.

    Args:
        w: Where to write.
        form: How: a name of `experts.choose.LOWERINGS`.
        block: Of all experts.
        experts: Those of this rank; there may be none.

    Raises:
        NotExportableError: The form does not compute such experts.
    """
    if not experts:
        return _nothing(w, block)
    if form == "contrib":
        raise NotExportableError(
            "com.microsoft.MoE cannot leave a token without an expert, and on one rank most have none",
            code=Code.RANKS_FORM,
            where=block.meaning.line,
            hint="the other forms of --experts can",
        )
    own = own_part(w, block, experts)
    if form in ONE_AT_A_TIME:
        return own_rows(w, form, own)
    if block.parts.body.inputs[EXPERT].uses():
        raise NotExportableError(
            "the experts read their own number, which this form counts from 0 on every rank",
            code=Code.RANKS_FORM,
            where=block.meaning.line,
            hint="--experts slices and --experts loop know it",
        )
    return LOWERINGS[form](w, guarded(w, dataclasses.replace(own.block, valid=None)))


def _nothing(w: GraphBuilder, block: Opaque) -> ir.Value:
    """(N, H) of zeros, for a rank without experts."""
    rows = w.op("Shape", block.indices, start=0, end=1)
    dtype = block.parts.body.outputs[0].dtype or ir.DataType.FLOAT
    zero = ir.tensor(np.zeros(1, dtype.numpy()), name="zero")
    return w.op(
        "ConstantOfShape", w.op("Concat", rows, w.ints(*known_sizes(block.hidden)), axis=0), value=zero
    )


def own_pairs(w: GraphBuilder, pairs: Sorted, count: int) -> tuple[Sorted, ir.Value]:
    """The sorted pairs of the first `count` bins, and their number (1,), which is the position of every other pair."""
    number = w.op("Slice", pairs.ends, w.ints(count - 1), w.ints(count), w.ints(0), name="own")
    first = [w.op("Slice", value, w.ints(0), number, w.ints(0)) for value in (pairs.token, pairs.slot)]
    counts, starts, ends = (
        w.op("Slice", value, w.ints(0), w.ints(count), w.ints(0))
        for value in (pairs.counts, pairs.starts, pairs.ends)
    )
    positions = w.op("Min", pairs.positions, number)
    return Sorted(first[0], first[1], counts, starts, ends, positions), number


def own_rows(w: GraphBuilder, form: Lowering, own: Own) -> ir.Value:
    """The pairs of these experts alone, expert by expert."""
    block = own.block
    pairs, _ = own_pairs(w, sort_by_expert(w, block.indices, block.count + 1, block.slots), block.count)
    builder = PartsBuilder(w, block.parts, block.indices, block.shared)
    rows = made_one_at_a_time(w, form, own, builder, builder.prologue(w, pairs.token, pairs.slot), pairs)
    return combine_in_order(w, block, builder, with_zero_row(w, block, rows), pairs.positions)


def made_one_at_a_time(
    w: GraphBuilder,
    form: Lowering,
    own: Own,
    builder: PartsBuilder,
    entering: Sequence[ir.Value],
    pairs: Sorted,
) -> list[ir.Value]:
    """What the experts make of rows (P, ...) that are sorted by expert, in a form of `ONE_AT_A_TIME`."""
    way = slices_of if form == "slices" else loop_of
    return way(w, own.block, builder, entering, pairs, own.experts)


def with_zero_row(w: GraphBuilder, block: Opaque, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """(P, ...) → (P + 1, ...): the last row is what pairs of nobody here read."""
    found = []
    for number, (value, inner) in enumerate(zip(rows, block.parts.leaving, strict=True)):
        assert inner.shape is not None
        assert inner.dtype is not None
        sizes = known_sizes(inner.shape[1:])
        zero = w.constant(np.zeros((1, *sizes), inner.dtype.numpy()), f"zero_row_{number}")
        found.append(w.op("Concat", value, zero, axis=0))
    return found
