"""Expand an MoE block whose tokens are this rank's own, and whose experts are everywhere: rows go there and back.

    before ─▶ sorted by rank and expert ═▶ core of the experts here ═▶ back in place ─▶ after ─▶ summed over slots
             (rows, experts, numbers)    exchange                  exchange

The parts are those of `experts/body_parts`: what every pair needs before runs where the token is, and what only the
expert can do where the expert is. Rows come as many as there are, and their numbers with them; or, with a capacity, C
for each rank always: pairs that find no place add nothing, as in GShard, and what is left of C is filled with rows of
no expert.

Letters: N tokens, k slots, S = N*k pairs, E experts, R ranks, P rows that came, C capacity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.errors import Code, NotExportableError
from moe_export.export.experts.body_parts import EXPERT, BodyParts, PartsBuilder
from moe_export.export.experts.choose import Lowering
from moe_export.export.experts.one_at_a_time import Opaque, combine_in_order
from moe_export.export.experts.sorting import Sorted, known_sizes, sort_by_expert
from moe_export.export.experts.weights import ExpertWeights
from moe_export.export.parallel.partial_sum import (
    DOMAIN,
    Own,
    in_range,
    made_one_at_a_time,
    of_experts,
    own_pairs,
    with_zero_row,
)
from moe_export.export.parallel.placement import Placement
from moe_export.graph_builder import GraphBuilder

ALL_TO_ALL = "AllToAll"


@dataclass(frozen=True)
class ThereAndBack:
    """Where rows go.

    Attributes:
        placement: Which rank has which expert.
        layer: Of the block.
        rank: Whose graph is written.
        capacity: C; None for as many rows as there are.
    """

    placement: Placement
    layer: int
    rank: int
    capacity: int | None

    @property
    def own(self) -> tuple[int, ...]:
        """The experts of this rank."""
        return self.placement.experts_of(self.layer, self.rank)

    @property
    def in_order(self) -> list[int]:
        """(E,) all experts, sorted by their ranks."""
        ranks = range(self.placement.ranks)
        return [expert for rank in ranks for expert in self.placement.experts_of(self.layer, rank)]

    @property
    def bounds(self) -> list[int]:
        """(R + 1,) where the experts of each rank begin in that order."""
        sizes = [len(self.placement.experts_of(self.layer, rank)) for rank in range(self.placement.ranks)]
        return [0, *np.cumsum(sizes).tolist()]


@dataclass(frozen=True)
class _Sent:
    """What goes to the ranks.

    Attributes:
        rows: Row values that the experts take, sorted by rank and expert.
        experts: Of each row, its expert's number on its rank; of a row of nobody -1.
        counts: (R,) rows for each rank.
        positions: (S,) where each pair's row is; behind the last row for pairs that have none.
        valid: Of the shape of the indices: pairs that have a row.
    """

    rows: Sequence[ir.Value]
    experts: ir.Value
    counts: ir.Value
    positions: ir.Value
    valid: ir.Value


def there_and_back(w: GraphBuilder, form: Lowering, block: Opaque, way: ThereAndBack) -> ir.Value:
    """The result (N, H) of a block for this rank's tokens.

    Args:
        w: Where to write.
        form: `slices`, `loop`, or `dense`, how the experts here compute their rows.
        block: Of all experts.
        way: Where rows go.

    Raises:
        NotExportableError: The form computes no rows that came from elsewhere, or an expert reads more than rows.
    """
    _refuse(form, block)
    builder = PartsBuilder(w, block.parts, block.indices, block.shared)
    sent = _sent(w, block, way, builder)
    known: list[ir.Value] = [] if way.capacity else [sent.counts]
    facts: dict[str, Any] = {"layer": way.layer, "capacity": way.capacity or 0}
    came = w.many(
        ALL_TO_ALL, *sent.rows, sent.experts, *known, outputs=len(sent.rows) + 1 + len(known), domain=DOMAIN,
        back=0, **facts,
    )  # fmt: skip
    for value, given in zip(came, [*block.parts.entering, sent.experts], strict=False):
        _as_rows(value, given)
    for value in (*known, *came[len(sent.rows) + 1 :]):
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([way.placement.ranks])
    here = w.inner("here")
    made = _computed(here, form, block, way, builder, came)
    w.take(here)
    for value, given in zip(made, block.parts.leaving, strict=True):
        _as_rows(value, given)
    back = w.many(
        ALL_TO_ALL,
        *made,
        *came[len(sent.rows) + 1 :],
        *known,
        outputs=len(made),
        domain=DOMAIN,
        back=1,
        **facts,
    )
    for value, given in zip(back, block.parts.leaving, strict=True):
        _as_rows(value, given)
    rows = with_zero_row(w, block, back)
    return combine_in_order(w, dataclasses.replace(block, valid=sent.valid), builder, rows, sent.positions)


def _as_rows(value: ir.Value, like: ir.Value) -> None:
    """Any number of rows of the type and size that a row of the body has."""
    assert like.shape is not None
    value.type, value.shape = like.type, ir.Shape([None, *like.shape[1:]])


def _refuse(form: Lowering, block: Opaque) -> None:
    parts = block.parts
    if form not in ("slices", "loop", "dense"):
        raise NotExportableError(
            f"{form} does not compute rows that other ranks sent",
            code=Code.RANKS_FORM,
            where=block.meaning.line,
            hint="--experts slices, loop or dense; or --exchange all_reduce",
        )
    local = {*parts.shared, *(value for node in parts.common for value in node.outputs)}
    constant = set(parts.body.initializers.values())
    reading = [value for node in parts.core for value in node.inputs if value in local - constant]
    if reading or not ExpertWeights(_NOWHERE, block.weights, block.count, block.opset).known:
        what = "values of all tokens" if reading else "weights that are computed at run time"
        raise NotExportableError(
            f"an expert reads {what}, which the rank that holds it does not have",
            code=Code.RANKS_FORM,
            where=block.meaning.line,
            hint="--exchange all_reduce",
        )
    if form == "dense" and parts.body.inputs[EXPERT].uses():
        raise NotExportableError(
            "the experts read their own number, which this form counts from 0 on every rank",
            code=Code.RANKS_FORM,
            where=block.meaning.line,
            hint="--experts slices and --experts loop know it",
        )


_NOWHERE = GraphBuilder(ir.Graph([], [], nodes=[]), "nowhere")


def _sent(w: GraphBuilder, block: Opaque, way: ThereAndBack, builder: PartsBuilder) -> _Sent:
    order, bounds = way.in_order, way.bounds
    place = np.full(block.count + 1, block.count, dtype=np.int64)
    place[order] = np.arange(block.count)
    places = w.op("Gather", w.constant(place, "place"), in_range(w, block), axis=0, name="placed")
    places.shape, places.type = block.indices.shape, ir.TensorType(ir.DataType.INT64)
    pairs, number = own_pairs(w, sort_by_expert(w, places, block.count + 1, block.slots), block.count)
    ends = w.op("Concat", w.ints(0), pairs.ends, axis=0)
    limits = w.op("Gather", ends, w.ints(*bounds), axis=0)  # (R + 1,)
    starts = w.op("Slice", limits, w.ints(0), w.ints(-1), w.ints(0))
    counts = w.op(
        "Sub", w.op("Slice", limits, w.ints(1), w.ints(len(bounds)), w.ints(0)), starts, name="rows_for"
    )
    local = np.array(
        [number for size in np.diff(bounds) for number in range(int(size))] + [-1], dtype=np.int64
    )
    experts = w.op("Gather", w.constant(local, "local"), _bins(w, pairs, places, block.slots), axis=0)
    if way.capacity is None:
        valid = _valid(w, block, w.op("Less", pairs.positions, number))
        rows = builder.prologue(w, pairs.token, pairs.slot)
        return _typed(_Sent(rows, experts, counts, pairs.positions, valid), block)
    return _typed(_filled(w, block, way, builder, (pairs, experts, starts, counts, limits)), block)


def _typed(sent: _Sent, block: Opaque) -> _Sent:
    """Values that leave the graph have types; how many rows there are, the data decide."""
    for value, like in zip(sent.rows, block.parts.entering, strict=True):
        _as_rows(value, like)
    sent.experts.type, sent.experts.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None])
    return sent


def _bins(w: GraphBuilder, pairs: Sorted, places: ir.Value, slots: int) -> ir.Value:
    """(P,) the place of each sorted pair's expert."""
    pair = pairs.token if slots == 1 else w.op("Add", w.op("Mul", pairs.token, w.ints(slots)), pairs.slot)
    return w.op("Gather", w.op("Reshape", places, w.ints(-1)), pair, axis=0, name="bins")


def _valid(w: GraphBuilder, block: Opaque, has_row: ir.Value) -> ir.Value:
    valid = w.op("Reshape", has_row, w.op("Shape", block.indices), allowzero=1, name="has_row")
    valid.shape, valid.type = block.indices.shape, ir.TensorType(ir.DataType.BOOL)
    return valid


def _filled(
    w: GraphBuilder,
    block: Opaque,
    way: ThereAndBack,
    builder: PartsBuilder,
    found: tuple[Sorted, ir.Value, ir.Value, ir.Value, ir.Value],
) -> _Sent:
    """C rows for each rank: the first C of its pairs, and rows of nobody behind them."""
    pairs, experts, starts, counts, limits = found
    capacity, ranks = way.capacity or 0, way.placement.ranks
    within = w.constant(np.arange(capacity, dtype=np.int64), "within")
    taken = w.op("Less", within, _column(w, counts), name="taken")  # (R, C)
    source = w.op("Add", _column(w, starts), within)
    source = w.op("Reshape", w.op("Where", taken, source, w.scalar(0)), w.ints(-1), name="source")
    token, slot, expert = (
        w.op("Gather", w.op("Concat", value, w.ints(0), axis=0), source, axis=0)
        for value in (pairs.token, pairs.slot, experts)
    )
    expert = w.op("Where", w.op("Reshape", taken, w.ints(-1)), expert, w.scalar(-1))
    # Where a pair is: the rank that its position lies in, and how far behind the first of that rank.
    last = w.op(
        "Slice", limits, w.ints(1), w.ints(ranks), w.ints(0)
    )  # (R - 1,) where ranks but the first begin
    passed = w.op("GreaterOrEqual", _column(w, pairs.positions), last)
    rank = w.op(
        "ReduceSum", w.op("Cast", passed, to=ir.DataType.INT64), w.ints(1), keepdims=0, name="rank_of"
    )
    offset = w.op("Sub", pairs.positions, w.op("Gather", starts, rank, axis=0))
    number = w.op("Slice", limits, w.ints(ranks), w.ints(ranks + 1), w.ints(0))
    fits = w.op("And", w.op("Less", offset, w.scalar(capacity)), w.op("Less", pairs.positions, number))
    position = w.op("Add", w.op("Mul", rank, w.scalar(capacity)), offset)
    position = w.op("Where", fits, position, w.scalar(ranks * capacity), name="filled_positions")
    return _Sent(builder.prologue(w, token, slot), expert, counts, position, _valid(w, block, fits))


def _column(w: GraphBuilder, value: ir.Value) -> ir.Value:
    """(n,) → (n, 1), by `Reshape`: ONNX's inference takes what is unsqueezed for a shape, and adds its entries up."""
    return w.op("Reshape", value, w.ints(-1, 1))


def _computed(
    w: GraphBuilder,
    form: Lowering,
    block: Opaque,
    way: ThereAndBack,
    builder: PartsBuilder,
    came: Sequence[ir.Value],
) -> list[ir.Value]:
    """What the experts here make of the rows that came, in the order in which they came."""
    own, entering = way.own, list(came[: len(block.parts.entering)])
    numbers = came[len(entering)]
    if not own:
        return [_no_result(w, value, numbers) for value in block.parts.leaving]
    weights = [of_experts(w, weight, own, block.opset) for weight in block.weights]
    here = Own(dataclasses.replace(block, weights=weights, count=len(own)), own)
    bins = w.op("Where", w.op("Less", numbers, w.scalar(0)), w.scalar(len(own)), numbers)
    if form == "dense":
        return _dense(w, here, entering, bins)
    pairs, _ = own_pairs(w, sort_by_expert(w, bins, len(own) + 1, 1), len(own))
    rows = [w.op("Gather", value, pairs.token, axis=0) for value in entering]
    made = made_one_at_a_time(w, form, here, builder, rows, pairs)
    return [w.op("Gather", value, pairs.positions, axis=0) for value in with_zero_row(w, block, made)]


def _no_result(w: GraphBuilder, leaving: ir.Value, rows: ir.Value) -> ir.Value:
    """(P, ...) of zeros: a rank without experts gets no rows, or rows of nobody."""
    assert leaving.shape is not None
    assert leaving.dtype is not None
    sizes = known_sizes(leaving.shape[1:])
    shape = w.op("Concat", w.op("Shape", rows), w.ints(*sizes), axis=0)
    zero = ir.tensor(np.zeros(1, leaving.dtype.numpy()), name="zero")
    return w.op("ConstantOfShape", shape, value=zero)


def _dense(w: GraphBuilder, own: Own, entering: Sequence[ir.Value], bins: ir.Value) -> list[ir.Value]:
    """Every expert here computes every row, and a mask picks: no shape depends on the data."""
    block = own.block
    parts = block.batched()
    matched = _matched(parts, block.parts)
    if matched is None:
        raise NotExportableError(
            "the experts take other rows where several are computed at once",
            code=Code.EXPERTS_FORM,
            where=block.meaning.line,
            hint="--experts slices and --experts loop take one expert at a time",
        )
    builder = PartsBuilder(w, parts, block.indices, block.shared)
    ready = ExpertWeights(w, block.weights, block.count, block.opset).batched(parts, builder)
    every_expert = w.constant(np.arange(block.count)[:, None], "experts_here")  # (E, 1)
    rows = w.op("Shape", bins)
    shape = w.op("Concat", w.ints(block.count), rows, axis=0)
    wide = []
    for value, number in zip(parts.entering, matched, strict=True):
        if number is None:  # only its sizes are looked at
            wide.append(w.op("Expand", w.scalar(0), w.op("Concat", shape, w.ints(*_sizes(value, 2)), axis=0)))
            continue
        given, sizes = entering[number], _sizes(value, 2)
        spread = w.op("Expand", w.op("Unsqueeze", given, w.ints(0)), _behind(w, shape, given))
        if sizes != _sizes(block.parts.entering[number], 1):  # other axes of size 1
            spread = w.op("Reshape", spread, w.op("Concat", shape, w.ints(*sizes), axis=0))
        wide.append(spread)
    made = builder.core(w, wide, every_expert, ready)
    mask = w.op("Equal", w.op("Unsqueeze", bins, w.ints(0)), every_expert)  # (E, P)
    found = []
    for value, inner in zip(made, parts.leaving, strict=True):
        assert inner.shape is not None
        axes = range(2, len(inner.shape))
        masked = w.op(
            "Where", w.op("Unsqueeze", mask, w.ints(*axes)) if axes else mask, value, _zero(w, value)
        )
        found.append(w.op("ReduceSum", masked, w.ints(0), keepdims=0))
    return found


def _matched(several: BodyParts, one: BodyParts) -> list[int | None] | None:
    """Which of the rows that one expert's core takes are those that several experts' core takes, in order.

    Sizes may differ by axes of 1: the body was written anew with an axis of experts. None in the list is a value of
    which only the sizes are looked at; None for the list, that the two do not take, or give, the same.
    """
    if [_of_row(value, 2) for value in several.leaving] != [_of_row(value, 1) for value in one.leaving]:
        return None
    left = [number for number, value in enumerate(one.entering) if not _is_measured(value, one)]
    found: list[int | None] = []
    for value in several.entering:
        if _is_measured(value, several):
            if value.dtype is not ir.DataType.INT64 or not _has_sizes(value, 2):
                return None
            found.append(None)
            continue
        if not left:
            return None
        other = one.entering[left[0]]
        known = _has_sizes(value, 2) and _has_sizes(other, 1)
        alike = known and _without_ones(value, 2) == _without_ones(other, 1)
        if not alike and _of_row(value, 2) != _of_row(other, 1):
            return None
        found.append(left.pop(0))
    return None if left else found


def _is_measured(value: ir.Value, parts: BodyParts) -> bool:
    """Whether the core looks at the sizes of a value, and at nothing else of it."""
    core = set(parts.core)
    return all(node.op_type == "Shape" for node, _ in value.uses() if node in core)


def _sizes(value: ir.Value, lead: int) -> list[int]:
    """The sizes of a row value behind the rows, if they are numbers; -1 for those that are not."""
    return [size if isinstance(size, int) else -1 for size in (value.shape or ())[lead:]]


def _has_sizes(value: ir.Value, lead: int) -> bool:
    return value.shape is not None and -1 not in _sizes(value, lead)


def _without_ones(value: ir.Value, lead: int) -> tuple[object, ...]:
    return value.dtype, *(size for size in _sizes(value, lead) if size != 1)


def _of_row(value: ir.Value, lead: int) -> tuple[object, ...]:
    """The type of a row value, and its sizes behind the rows."""
    return value.dtype, *(value.shape or ())[lead:]


def _behind(w: GraphBuilder, shape: ir.Value, value: ir.Value) -> ir.Value:
    """(E, P) and the sizes of a row behind it."""
    return w.op("Concat", shape, w.op("Shape", value, start=1), axis=0)


def _zero(w: GraphBuilder, value: ir.Value) -> ir.Value:
    return w.op("CastLike", w.scalar(0), value)
