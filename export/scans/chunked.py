"""`expand_chunked`: a linear recurrence with one decay a head, or a key, as matrix products over chunks of its steps.

    h(t) = a(t) h(t-1) + B(t) u(t)        within a chunk of T steps, from its state h at the start:
    y(t) = C(t) h(t)                      y = (D * C B^T) u + (d * C) h         D(t, s) = a(s+1) … a(t), 0 for s > t
                                          h' = d(T) h + (e * B)^T u             d(t) = a(1) … a(t), e(s) = D(T, s)

Everything but the last line is computed for all chunks at once; a `Scan` over the chunks passes the states on. Any
length is allowed: the last chunk is filled up with steps that keep the state. A delta rule stores what depends on its
state, and so does what is fed with what it reads; for these the `Scan` computes u, too (`chunked_delta`). Where each
key has its own decay, D stands inside of the product C B^T (`key_decays`).

A decay a head is kept as its logarithm. D is the exponential of the sums of the segments s+1 … t, each summed alone, as
one product with a matrix of ones and zeros: all terms have one sign, so no digit is lost however strong the decay is,
and the exponential of a sum <= 0 never overflows. (The usual difference of two cumulative sums is wrong by 1e-3.)

Source of the form: state space duality, arXiv:2405.21060, section 6.

Letters: c chunks, t, s steps of a chunk, g batch axes of the state, n axes read over, p the other axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.errors import RefusedError
from moe_export.export.scans.batched import BatchedValue
from moe_export.export.scans.chunked_delta import Correction, correction, feedback
from moe_export.export.scans.delta import read_delta
from moe_export.export.scans.filling import Filling
from moe_export.export.scans.key_decays import KEY_STEPS, KeyDecays
from moe_export.export.scans.linear import Linear, LinearState
from moe_export.export.scans.loop_region import LoopRegion
from moe_export.export.scans.parallel_form import ParallelForm, Part
from moe_export.export.scans.segments import STEPS, Segments
from moe_export.export.scans.terms import Reading
from moe_export.graph_builder import GraphBuilder

_LEAST = -1e30  # stands for log 0: -inf times the 0 that leaves it out of another segment would be NaN
_DTYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def _steps(state: LinearState) -> int:
    """How many steps a chunk has."""
    return KEY_STEPS if state.decays_over else STEPS


def pays(linear: Linear) -> bool:
    """Whether chunks compute less than single steps: one decay serves at least as many entries as a chunk has steps.

    Where keys have decays of their own, chunks took 0.2 to 0.8 of the time of single steps at 64 and 512 steps, with 16
    to 128 values a key, 8 to 128 keys and 1 to 16 heads; at fewer than 8 steps single ones are faster.
    """
    by_key = [state for state in linear.states if state.decays_over]
    decays = sum(state.size((*state.batch, *state.over)) for state in by_key)
    entries = sum(state.size((*state.batch, *state.over, *state.only)) for state in by_key)
    others = (state for state in linear.states if not state.decays_over)
    return entries >= KEY_STEPS * decays and all(
        state.size((*state.over, *state.only)) >= STEPS for state in others
    )


def expand_chunked(loop: LoopRegion, only_if_it_pays: bool = False, single_steps: bool = False) -> str:
    """Replace a loop region by products over chunks.

    Args:
        loop: The loop region.
        only_if_it_pays: Also refuse a loop for which `pays` is false, and decays that are not known to be positive.
        single_steps: The graph runs single steps, too: also refuse what a chunk takes several times as long for.

    Returns:
        How many steps the chunks have, for the report.

    Raises:
        RefusedError: It is not such a recurrence; the graph still computes what it did.
    """
    linear = read_delta(loop, fed=True)
    by_key = [state for state in linear.states if state.decays_over]
    if by_key and all(state.size(state.only) == 1 for state in by_key):
        raise RefusedError("its decay differs along the axes that are read over, and each entry has its own")
    if only_if_it_pays and not pays(linear):
        least = KEY_STEPS if by_key else STEPS
        raise RefusedError(f"one decay serves fewer than {least} entries of the state")
    slow = (state for state in linear.states if state.rate is not None or state.fed is not None)
    if single_steps and any(slow):
        raise RefusedError("a single step of a delta rule takes less than a chunk")
    if single_steps and by_key:
        raise RefusedError("a single step with a decay for each key takes less than a chunk")
    _Writer(loop, linear).write(known_decays=only_if_it_pays)
    return " and ".join(str(steps) for steps in sorted({_steps(state) for state in linear.states}))


class _Writer:
    def __init__(self, loop: LoopRegion, linear: Linear) -> None:
        if all(state.outputs[0].dtype not in _DTYPES for state in loop.states):
            raise RefusedError("states that are neither float32 nor float64")
        self._loop, self._linear = loop, linear
        self.steps = ParallelForm(loop, "chunks")
        self.nodes, self.over = self.steps.nodes, self.steps.over
        self._fillings: dict[int, Filling] = {}
        self._axis = loop.axes[0] if loop.axes else 0

    def write(self, known_decays: bool) -> None:
        if known_decays:
            for state in self._linear.states:
                if state.decays_over:
                    self.steps.logarithms(state.decay)  # only for its refusals: the products below need none
        self.steps.replace([self._state(number) for number in range(len(self._linear.states))])

    def _state(self, number: int) -> ir.Value:
        """Write everything that is read from one state; returns its last value."""
        state, boundary, nodes = self._linear.states[number], self._loop.states[number], self.nodes
        dtype = boundary.outputs[0].dtype
        assert dtype is not None
        readings = [reading for reading in self._linear.readings if reading.state == number]
        rank = len(state.batch) + 2
        segments: Segments | KeyDecays
        if state.decays_over:
            decay = self._chunks(self.steps.product(state.decay), state, state.over, 1)  # (c, g, t, n)
            segments = KeyDecays(nodes, decay, rank)
        else:
            segments = Segments(nodes, self._decay(state), dtype, rank)
            for reading in readings:
                segments.within(reading.new)
        rows = self._chunks(self.steps.product(state.row), state, state.over)  # (c, g, s, n)
        column = self._chunks(self.steps.product(state.column), state, state.only)  # (c, g, s, p)
        nodes, wrong, stored = self.nodes, None, [(rows, column)]
        if state.rate is not None:
            rate = self._chunks(self.steps.product(state.rate), state, ())  # (c, g, s, 1)
            stored = [(nodes.op("Mul", rows, rate), column)]
            wrong = correction(nodes, rows, stored[0][0], rate, column, segments)
        elif state.fed is not None:
            read = self._chunks(self.steps.product(state.fed.read), state, state.over)  # (c, g, t, n)
            again = self._chunks(self.steps.product(state.fed.row), state, state.over)  # (c, g, s, n)
            again = nodes.op("Neg", again) if state.fed.minus else again
            wrong = feedback(nodes, read, again, (rows, column), segments)
        starts, last, columns = self._pass_on(state, boundary, (rows, column), wrong, segments)
        if state.rate is not None and columns is not None:
            stored = [(stored[0][0], columns)]
        elif state.fed is not None and columns is not None:
            stored.append((again, columns))
        for reading in readings:
            self._read(reading, state, stored, starts, segments)
        return last

    @staticmethod
    def _rank(state: LinearState) -> int:
        return len(state.batch) + 3

    # The chunks of a factor

    def _decay(self, state: LinearState) -> ir.Value | None:
        """The logarithms of the decay, (c, g, t); None for no decay."""
        if not state.decay:
            return None
        total, axes = self.steps.logarithms(state.decay)
        least = self.nodes.constant(np.array(_LEAST, self.steps.dtype.numpy()))
        total = BatchedValue(self.nodes.op("Max", total.value, least), total.axis, total.rank)
        return self._chunks((total, axes), state, None)

    def _chunks(
        self,
        part: Part,
        state: LinearState,
        inner: tuple[int, ...] | None,
        filling: int = 0,
    ) -> ir.Value:
        """(c, g, t, inner) of a value over time: batch axes that it lacks have size 1, inner axes are joined."""
        batched, axes = part
        nodes = self.nodes
        batched = self.steps.in_every_step(batched)
        assert batched.axis is not None
        free = [axis for axis in axes if not isinstance(state.shape[axis], int)]
        ahead = [axis for place, axis in enumerate(axes) if place < batched.axis]
        if not set(free) <= set(ahead):
            order = [*free, None, *(axis for axis in axes if axis not in free)]
            now: list[int | None] = [*axes]
            now.insert(batched.axis, None)
            batched = BatchedValue(
                nodes.transposed(batched.value, [now.index(axis) for axis in order]), len(free), batched.rank
            )
            axes = [axis for axis in order if axis is not None]
        at = batched.axis
        assert at is not None
        by = nodes.constant(np.array(filling, self.steps.dtype.numpy())) if filling else None
        steps = _steps(state)
        if steps not in self._fillings:
            self._fillings[steps] = Filling(nodes, self.steps.length, steps)
        value = self._fillings[steps].behind(batched.value, at, batched.rank + 1, by)
        behind = state.sizes(axes[at:])
        value = nodes.op("Reshape", value, nodes.ints(*[0] * at, -1, steps, *behind))
        places: dict[Any, int] = {axis: place + 2 * (place >= at) for place, axis in enumerate(axes)}
        if any(axis not in places and state.shape[axis] != 1 for axis in inner or ()):
            raise RefusedError("a factor lacks an axis that the others have")
        batch = [places[axis] for axis in state.batch if axis in places]
        last = [places[axis] for axis in inner or () if axis in places]
        value = nodes.transposed(value, [at, *batch, at + 1, *last])
        lacking = [place for place, axis in enumerate(state.batch, 1) if axis not in places]
        value = nodes.unsqueezed(
            value, [*lacking, *([len(state.batch) + 2] if inner is not None and not last else [])]
        )
        if inner is not None and len(inner) > 1:
            kept = [0] * (len(state.batch) + 1)
            value = nodes.op("Reshape", value, nodes.ints(*kept, steps, state.size(inner)))
        return value

    def _steps_last(self, value: ir.Value, state: LinearState) -> ir.Value:
        """(…, s, n) → (…, n, s), right before a product: runtimes fuse the two."""
        behind = self._rank(state) - 1
        return self.nodes.transposed(value, [*range(behind - 1), behind, behind - 1])

    # States from chunk to chunk

    def _pass_on(
        self,
        state: LinearState,
        boundary: ir.Node,
        added: tuple[ir.Value, ir.Value],
        wrong: Correction | None,
        segments: Segments | KeyDecays,
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """The states at the start of each chunk, (c, g, n, p); the state after the last one; the columns of a system.

        The steps add rows times columns. The columns of a delta rule are what is known of them before, corrected by
        what is wrong with that.
        """
        nodes, size = self.nodes, state.size
        rows, column = added
        order = [*state.batch, *state.over, *state.only]
        shape = [state.shape[axis] for axis in state.batch]
        first = nodes.transposed(boundary.inputs[0], order) if boundary.inputs[0] is not None else None
        assert first is not None
        inner = (len(state.over), len(state.only))
        if inner != (1, 1):
            first = nodes.op("Reshape", first, nodes.ints(*_kept(shape), size(state.over), size(state.only)))
        decay = segments.whole() if segments.has_decay else None
        whole = [*shape, size(state.over), size(state.only)]
        columns = None
        if wrong is not None:
            last, starts, columns = wrong.scan(nodes, first, decay, whole)
        else:
            if state.decays_over or size(state.over) <= size(state.only):
                rows = segments.to_end(rows)
            else:
                column = segments.to_end(column)
            product = nodes.op("MatMul", self._steps_last(rows, state), column)
            last, starts = _scan(nodes, first, decay, product, whole)
        if inner != (1, 1):
            sizes = state.sizes((*state.over, *state.only))
            last = nodes.op("Reshape", last, nodes.ints(*_kept(shape), *sizes))
        return starts, nodes.transposed(last, [order.index(axis) for axis in range(len(order))]), columns

    # What is read

    def _read(
        self,
        reading: Reading,
        state: LinearState,
        stored: Sequence[tuple[ir.Value, ir.Value]],
        starts: ir.Value,
        segments: Segments | KeyDecays,
    ) -> None:
        nodes = self.nodes
        read = self._chunks(self.steps.product(reading.factors), state, state.over)  # (c, g, t, n)
        if state.decays_over or state.size(state.over) <= state.size(state.only):
            before = nodes.op("MatMul", segments.from_start(read, reading.new), starts)
        else:
            before = segments.from_start(nodes.op("MatMul", read, starts), reading.new)
        total = before
        for rows, column in stored:
            inside = nodes.op("MatMul", segments.pairs(read, rows, reading.new), column)
            total = nodes.op("Add", inside, total)  # (c, g, t, p)
        self.steps.know(reading, self._unchunked(total, reading, state))

    def _unchunked(self, value: ir.Value, reading: Reading, state: LinearState) -> BatchedValue:
        """(c, g, t, p) as a value over time with the axes that the step gives it."""
        nodes = self.nodes
        if len(state.only) > 1:
            sizes = state.sizes(state.only)
            value = nodes.op("Reshape", value, nodes.ints(*[0] * (len(state.batch) + 2), *sizes))
        place: dict[int, int] = {axis: 1 + at for at, axis in enumerate(state.batch)}
        place |= {axis: len(state.batch) + 2 + at for at, axis in enumerate(state.only)}
        if {axis for joined in reading.axes for axis in joined} != set(place):
            raise RefusedError("what is read lacks an axis of the state")
        front = 0  # axes in front of time: as many as the loop's result has there, and all of unknown size
        for at, joined in enumerate(reading.axes):
            sizes_known = all(isinstance(state.shape[axis], int) for axis in joined)
            if len(joined) == 1 and at == front and (at < self._axis or not sizes_known):
                front += 1
            elif not sizes_known:
                raise RefusedError("an axis of unknown size comes after others")
        order = [place[joined[0]] for joined in reading.axes[:front]]
        behind = [axis for joined in reading.axes[front:] for axis in joined]
        order += [0, len(state.batch) + 1, *(place[axis] for axis in behind)]
        extra = [len(state.batch) + 2] if not state.only else []
        value = nodes.transposed(value, [*order, *extra])
        sizes = [state.size(joined) for joined in reading.axes[front:]]
        value = nodes.op("Reshape", value, nodes.ints(*[0] * front, -1, *sizes))
        value = nodes.op("Slice", value, nodes.ints(0), self.steps.length, nodes.ints(front))
        return BatchedValue(value, front, len(reading.axes))


def _kept(shape: Sequence[int | ir.SymbolicDim]) -> list[int]:
    return [0] * len(shape)


def _scan(
    nodes: GraphBuilder,
    first: ir.Value,
    decay: ir.Value | None,
    added: ir.Value,
    shape: Sequence[int | ir.SymbolicDim],
) -> tuple[ir.Value, ir.Value]:
    """`h' = decay * h + added` chunk by chunk: the last h', and the h of every chunk."""
    body = nodes.inner("chunk")
    state, factor, step = (
        ir.Value(name=f"{body.prefix}.{name}", type=first.type) for name in ("state", "decay", "added")
    )
    inputs, sequences, product = [state, step], [added], state
    if decay is not None:
        inputs, sequences, product = [state, factor, step], [decay, added], body.op("Mul", state, factor)
    outputs = [body.op("Add", product, step), body.op("Identity", state)]
    for value in (state, *outputs):
        value.shape = ir.Shape(shape)
    graph = ir.Graph(inputs, outputs, nodes=body.nodes, name=body.prefix)
    last, starts = nodes.many(
        "Scan", first, *sequences, outputs=2, body=graph, num_scan_inputs=len(sequences)
    )
    last.shape, last.type, starts.type = ir.Shape(shape), first.type, first.type
    return last, starts
