"""Pairs sorted by expert, and their rows added up by token: what several lowerings of experts write.

    indices (N, k) ─▶ counted ─▶ sorted: tokens, slots, positions (S,)       rows (S, H) ─▶ combined (N, H)

Letters: N tokens, k slots, S = N*k pairs, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moe_export.errors import Code, NotExportableError
from moe_export.graph_builder import GraphBuilder

INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class Counted:
    """How the pairs spread over the experts.

    Attributes:
        flat: (S,) int64, the expert of each pair, token by token.
        rank: (S,) int64, how many pairs of the same expert come before each.
        counts: (E,) int64, the number of pairs of each expert.
    """

    flat: ir.Value
    rank: ir.Value
    counts: ir.Value


def count_by_expert(w: GraphBuilder, indices: ir.Value, count: int) -> Counted:
    """Count pairs by expert: one-hot and a cumulative sum, the same order on every machine.

    Args:
        w: Where to write.
        indices: (N, k) or (N,).
        count: E.
    """
    flat = w.op("Reshape", indices, w.ints(-1))
    column = w.op("Unsqueeze", flat, w.ints(1))
    experts = w.constant(np.arange(count, dtype=np.int64), "experts")
    hot = w.op("Cast", w.op("Equal", column, experts), to=ir.DataType.INT32)  # (S, E)
    ranks = w.op("CumSum", hot, w.scalar(0), exclusive=1)
    rank = w.op("Squeeze", w.op("GatherElements", ranks, column, axis=1), w.ints(1))
    counts = w.op("ReduceSum", hot, w.ints(0), keepdims=0)
    return Counted(
        flat=flat,
        rank=w.op("Cast", rank, to=INT64, name="rank"),
        counts=w.op("Cast", counts, to=INT64, name="counts"),
    )


def every_pair(w: GraphBuilder, values: ir.Value, name: str = "pairs") -> ir.Value:
    """The numbers 0 to S - 1, for a value (S,)."""
    return w.op("Range", w.scalar(0), w.op("Size", values), w.scalar(1), name=name)


@dataclass(frozen=True)
class Sorted:
    """Pairs in the order of their experts.

    Attributes:
        token, slot: (S,) int64, of the pairs sorted by expert, and by token within an expert.
        counts, starts, ends: (E,) int64, how many pairs each expert has, and where its part begins and ends.
        positions: (S,) int64, for each pair in the order of the tokens, its place among the sorted ones.
    """

    token: ir.Value
    slot: ir.Value
    counts: ir.Value
    starts: ir.Value
    ends: ir.Value
    positions: ir.Value


def sort_by_expert(w: GraphBuilder, indices: ir.Value, count: int, slots: int) -> Sorted:
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


def apart(w: GraphBuilder, pairs: ir.Value, slots: int) -> tuple[ir.Value, ir.Value]:
    """The token and the slot of each pair, from its flat number."""
    if slots == 1:
        return pairs, w.op("Sub", pairs, pairs, name="slot")
    return w.op("Div", pairs, w.ints(slots), name="token"), w.op("Mod", pairs, w.ints(slots), name="slot")


def known_sizes(sizes: Iterable[object]) -> list[int]:
    """The sizes of a row, for a lowering that has to know them.

    Raises:
        NotExportableError: One of them is free, such as the height of an image.
    """
    found = list(sizes)
    if not all(isinstance(size, int) for size in found):
        raise NotExportableError(
            "this form of the experts needs rows of fixed sizes, and theirs are free",
            code=Code.EXPERTS_FORM,
            hint="choose --experts slices, or fix the sizes with --static",
        )
    return [size for size in found if isinstance(size, int)]


def with_lead(w: GraphBuilder, value: ir.Value, lead: Sequence[int], sizes: Sequence[int | None]) -> ir.Value:
    """A value (..., *sizes) with other leading axes.

    Args:
        w: Where to write.
        value: Any leading axes, then those of a row.
        lead: The leading axes of the result; one of them may be -1.
        sizes: The sizes of a row; None for one that is free.
    """
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        return w.op("Reshape", value, w.ints(*lead, *known))
    shape = w.op("Concat", w.ints(*lead), w.op("Shape", value, start=-len(sizes)), axis=0)
    return w.op("Reshape", value, shape)


def combine(
    w: GraphBuilder, rows: ir.Value, slots: int, hidden: Sequence[int | None], valid: ir.Value | None = None
) -> ir.Value:
    """The sums (N, H), over the slots of each token, of the rows of all S pairs.

    Args:
        w: Where to write.
        rows: The S rows of H, token by token, with any leading axes.
        slots: k.
        hidden: The sizes of H; None for one that is free.
        valid: (N, k) or (N,) bool, the pairs that count; None if all do.
    """
    by_token = with_lead(w, rows, (-1, slots) if slots > 1 else (-1,), hidden)
    if valid is not None:
        columns = w.op("Reshape", valid, w.ints(-1, *[slots] * (slots > 1), *[1] * len(hidden)))
        by_token = w.op("Where", columns, by_token, w.op("CastLike", w.scalar(0), by_token))
    return w.op("ReduceSum", by_token, w.ints(1), keepdims=0, name="combined") if slots > 1 else by_token
