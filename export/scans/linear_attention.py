"""`expand_linear_attention`: linear recurrences and delta rules as `com.microsoft.LinearAttention` of ONNX Runtime.

    S' = exp(g) S + k v            gated; linear without g           y = q S'
    S' = exp(g) S + beta k (v - k exp(g) S)        gated_delta; delta without g

    state   (batch, heads, d_k, d_v)    d_k: the axes that are read over, d_v: those that only the value has
    q, k    (batch, length, heads * d_k)             v, y    (batch, length, heads * d_v)
    g       (batch, length, heads) or (batch, length, heads * d_k)         beta    (batch, length, heads)

The operator takes the decay's logarithm, which is read off how the model computes the decay, not computed from its
value; a decay that is not known to be positive is refused. The operator reads its state after each step; a loop that
reads it before is given one more step at the start, which stores nothing.

Source: the operator's schema in onnxruntime 1.31 (com.microsoft.LinearAttention).
"""

from __future__ import annotations

import math

import onnx_ir as ir

from moe_export.errors import RefusedError
from moe_export.export.scans.batched import BatchedValue
from moe_export.export.scans.delta import read_delta
from moe_export.export.scans.linear import LinearState
from moe_export.export.scans.loop_region import LoopRegion
from moe_export.export.scans.parallel_form import ParallelForm, Part
from moe_export.export.scans.terms import Reading

DOMAIN = "com.microsoft"
_FEW_HEADS, _SMALL_HEAD = 32, 128
"""The CPU kernel takes at least 0.1 µs a head and step, however small the head: 256 heads of 16 entries (Mamba-1, one
head a channel) took 24 ms for 512 steps, a Scan 3.7 ms. So it is used up to 32 heads, or with 128 entries a head."""


def expand_linear_attention(loop: LoopRegion) -> None:
    """Replace a loop region by the operator, one for each way that a state is read.

    Raises:
        RefusedError: It is not such a recurrence; the graph still computes what it did.
    """
    linear = read_delta(loop)
    if any(boundary.outputs[0].dtype != ir.DataType.FLOAT for boundary in loop.states):
        raise RefusedError("states that are not float32")
    if any(reading.new != linear.readings[0].new for reading in linear.readings):
        raise RefusedError("one state is read before its step, another after it")
    if any(len(_free(state)) > 1 for state in linear.states):
        raise RefusedError("a state with several axes of unknown size")
    if not any(_pays(state) for state in linear.states):
        raise RefusedError("its decays make many small heads of the state, for which a Scan is faster")
    steps = ParallelForm(loop, "attention")
    last = []
    for number, (state, boundary) in enumerate(zip(linear.states, loop.states, strict=True)):
        readings = [reading for reading in linear.readings if reading.state == number]
        last.append(_Attention(steps, state, boundary).write(readings))
    steps.replace(last)


def _pays(state: LinearState) -> bool:
    heads = math.prod(size for axis in state.batch if isinstance(size := state.shape[axis], int))
    return heads <= _FEW_HEADS or state.size((*state.over, *state.only)) >= _SMALL_HEAD


def _free(state: LinearState) -> list[int]:
    """The axes of unknown size, which become the operator's batch."""
    return [axis for axis in state.batch if not isinstance(state.shape[axis], int)]


class _Attention:
    """Writes the operator for one state of a loop."""

    def __init__(self, steps: ParallelForm, state: LinearState, boundary: ir.Node) -> None:
        self._steps, self._nodes, self._state = steps, steps.nodes, state
        assert boundary.inputs[0] is not None
        self._first = boundary.inputs[0]
        self._batch = _free(state)
        self._heads = [axis for axis in state.batch if axis not in self._batch]
        self._order = [*self._batch, *self._heads, *state.over, *state.only]

    def write(self, readings: list[Reading]) -> ir.Value:
        """Write the operator for each reading; returns the last state."""
        state, nodes, size = self._state, self._nodes, self._state.size
        heads = size(self._heads)
        before = not readings[0].new
        key, value = (
            self._packed(self._steps.product(state.row), state.over),
            self._packed(self._steps.product(state.column), state.only),
        )
        decay = rate = None
        if state.decay:
            inner = state.over if state.decays_over else ()
            decay = self._packed(self._steps.logarithms(state.decay), inner)
        if state.rate is not None:
            rate = self._packed(self._steps.product(state.rate), ())
        first = nodes.transposed(self._first, self._order)
        batch = [0] if self._batch else [1]
        first = nodes.op("Reshape", first, nodes.ints(*batch, heads, size(state.over), size(state.only)))
        rule = {(False, False): "linear", (True, False): "gated", (False, True): "delta"}.get(
            (decay is not None, rate is not None), "gated_delta"
        )
        steps = [
            one if one is None or not before else self._padded(one, 1, 0) for one in (key, value, decay, rate)
        ]
        last: ir.Value | None = None
        for reading in readings:
            query = self._packed(self._steps.product(reading.factors), state.over)
            query = self._padded(query, 0, 1) if before else query
            found, present = nodes.many(
                "LinearAttention", query, *steps[:2], first, *steps[2:], outputs=2, domain=DOMAIN,
                q_num_heads=heads, kv_num_heads=heads, update_rule=rule, scale=1.0,
            )  # fmt: skip
            found.type, present.type = query.type, first.type
            if before:
                found = nodes.op("Slice", found, nodes.ints(0), self._steps.length, nodes.ints(1))
            self._steps.know(reading, self._unpacked(found, reading))
            last = last or present
        assert last is not None
        sizes = state.sizes([axis for axis in self._order if axis not in self._batch])
        last = nodes.op("Reshape", last, nodes.ints(*[0] * len(self._batch), *sizes))
        return nodes.transposed(last, [self._order.index(axis) for axis in range(len(self._order))])

    def _packed(self, part: Part, inner: tuple[int, ...]) -> ir.Value:
        """(batch, length, heads * inner) of a value over time; axes that it lacks are repeated."""
        nodes, state = self._nodes, self._state
        batched, axes = self._steps.in_every_step(part[0]), part[1]
        wanted = [*self._batch, None, *self._heads, *inner]
        now: list[int | None] = [*axes]
        assert batched.axis is not None
        now.insert(batched.axis, None)
        if not set(now) <= set(wanted):
            raise RefusedError("a factor has an axis for which the operator has no place")
        value = nodes.transposed(batched.value, [now.index(axis) for axis in wanted if axis in now])
        lacking = [place for place, axis in enumerate(wanted) if axis not in now]
        value = nodes.unsqueezed(value, lacking)
        if lacking:
            sizes = [
                state.shape[axis] if axis is not None and place in lacking else 1
                for place, axis in enumerate(wanted)
            ]
            value = nodes.op("Expand", value, self._shape(sizes))
        if not self._batch:
            value = nodes.unsqueezed(value, [0])
        return nodes.op("Reshape", value, nodes.ints(0, 0, state.size((*self._heads, *inner))))

    def _shape(self, sizes: list[int | ir.SymbolicDim]) -> ir.Value:
        """A shape as int64, of which the first size may be the unknown batch."""
        nodes = self._nodes
        if all(isinstance(size, int) for size in sizes):
            return nodes.ints(*(size for size in sizes if isinstance(size, int)))
        (axis,) = self._batch
        batch = nodes.op("Shape", self._first, start=axis, end=axis + 1)
        return nodes.op(
            "Concat", batch, nodes.ints(*(size for size in sizes[1:] if isinstance(size, int))), axis=0
        )

    def _padded(self, value: ir.Value, ahead: int, behind: int) -> ir.Value:
        """A packed value with steps of zeros before the first or after the last."""
        return self._nodes.op("Pad", value, self._nodes.ints(0, ahead, 0, 0, behind, 0))

    def _unpacked(self, value: ir.Value, reading: Reading) -> BatchedValue:
        """(batch, length, heads * d_v) as a value over time with the axes that the step gives it."""
        nodes, state = self._nodes, self._state
        axes = [*self._heads, *state.only]
        flat = [axis for joined in reading.axes for axis in joined]
        if sorted(flat) != sorted([*self._batch, *axes]):
            raise RefusedError("what is read lacks an axis of the state")
        now = [*self._batch, None, *axes]
        if not self._batch:
            value = nodes.op("Squeeze", value, nodes.ints(0))
        if len(axes) != 1:
            value = nodes.op("Reshape", value, nodes.ints(*[0] * (1 + len(self._batch)), *state.sizes(axes)))
        at = int(bool(self._batch) and reading.axes[0] == tuple(self._batch))
        order = [*flat[:at], None, *flat[at:]]
        value = nodes.transposed(value, [now.index(axis) for axis in order])
        if any(len(joined) != 1 for joined in reading.axes):
            sizes = [
                -1 if joined == tuple(self._batch) else state.size(joined) for joined in reading.axes[at:]
            ]
            value = nodes.op("Reshape", value, nodes.ints(*[0] * (at + 1), *sizes))
        return BatchedValue(value, at, len(reading.axes))
