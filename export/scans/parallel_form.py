"""`ParallelForm`: what the steps of a loop region compute apart from the states, for all steps at once.

    product     of factors that have some of the state's axes        B[l, n] * dt[l, h]   →   (l, h, n)
    logarithms  of the factors of a decay, summed                    exp(dt[l, h] * A[h]) →   (l, h)
    replace     the loop's last states and its results               last, ys = End(…)    →   what was computed

The forms that do not go step by step (`chunked`, `linear_attention`) compute their states from these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from moe_export.errors import RefusedError
from moe_export.export.scans.batched import BatchedOverTime, BatchedValue, flipped, moved
from moe_export.export.scans.log import logarithm
from moe_export.export.scans.loop_region import LoopRegion, integer
from moe_export.export.scans.terms import Factor, Reading, axes_of
from moe_export.graph_builder import GraphBuilder

Part = tuple[BatchedValue, list[int]]
"""A value over time, and which axes of the state it has, in ascending order."""


class ParallelForm:
    """The steps of a loop, batched over time.

    Attributes:
        nodes: Where nodes are written.
        over: The values of the step, batched over time.
        length: How many steps there are; int64, (1,).
        dtype: The type of the first state.

    Args:
        loop: The loop.
        prefix: What the names of written nodes begin with.

    Raises:
        RefusedError: No step reads an element of a sequence.
    """

    def __init__(self, loop: LoopRegion, prefix: str) -> None:
        self._loop = loop
        self.nodes = nodes = GraphBuilder.in_front_of(loop.end, f"{prefix}_{loop.number}")
        sources = {boundary.outputs[0]: _source(nodes, boundary) for boundary in loop.elements}
        if not sources:
            raise RefusedError("its steps read no sequence")
        self.over = BatchedOverTime(nodes, sources, {value for node in loop.body for value in node.outputs})
        first = next(iter(sources.values()))
        assert first.axis is not None
        self.length = nodes.op("Shape", first.value, start=first.axis, end=first.axis + 1)
        dtype = loop.states[0].outputs[0].dtype
        assert dtype is not None
        self.dtype = dtype

    def product(self, factors: Sequence[Factor]) -> Part:
        """The product of factors, with the axes that any of them has; 1 if there are none."""
        axes = sorted(axes_of(factors))
        parts = [self._spread(factor.labels, self.over.of(factor.value), axes) for factor in factors]
        if not parts:
            return BatchedValue(self.nodes.constant(np.ones((), self.dtype.numpy())), None, 0), []
        return self._joined("Mul", parts), axes

    def logarithms(self, factors: Sequence[Factor]) -> Part:
        """The logarithm of a product of decays, each of which is known to be positive.

        Raises:
            RefusedError: One of them is not.
        """
        axes = sorted(axes_of(factors))
        parts = [
            self._spread(factor.labels, logarithm(self.nodes, self.over, factor.value, self._loop), axes)
            for factor in factors
        ]
        return self._joined("Add", parts), axes

    def replace(self, last: Sequence[ir.Value]) -> None:
        """Use the last states, and what each step returns, instead of the loop's outputs.

        Raises:
            RefusedError: What the steps return is the same in each step.
        """
        results = []
        for value, axis, backwards in zip(
            self._loop.collected, self._loop.axes, self._loop.backwards, strict=True
        ):
            batched = self.over.of(value)
            if batched.axis is None:
                raise RefusedError("a result is the same in each step")
            result = moved(self.nodes, batched, axis).value
            results.append(flipped(self.nodes, result, axis) if backwards else result)
        for old, new in zip(self._loop.end.outputs, [*last, *results], strict=True):
            new.shape, new.type = old.shape, old.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)

    def know(self, reading: Reading, batched: BatchedValue) -> None:
        """Record what a reading is.

        Args:
            reading: What is read.
            batched: What is read from the state before the reading's products are added to it, with the reading's axes.
        """
        for term in reading.terms:
            other = self._summed(term, reading)
            axis = batched.axis
            assert axis is not None
            batched = BatchedValue(
                self.nodes.op("Add", batched.value, moved(self.nodes, other, axis).value), axis, batched.rank
            )
        self.over.know(reading.value, batched)

    def _summed(self, term: Sequence[Factor], reading: Reading) -> BatchedValue:
        """The sum of a product over the axes that a state is read over, with the axes of the reading.

        Factors without these axes are multiplied by the sum afterwards, so that less is summed.
        """
        over = sorted(reading.over)
        if any(len(joined) > 1 for joined in reading.axes) or not reading.over <= axes_of(term):
            raise RefusedError("what is read is more than a product with a state")
        batched, axes = self.product([factor for factor in term if factor.axes & reading.over])
        batched = moved(self.nodes, self.in_every_step(batched), 0)
        gone = self.nodes.ints(*(1 + axes.index(axis) for axis in over))
        left = [axis for axis in axes if axis not in reading.over]
        total = BatchedValue(self.nodes.op("ReduceSum", batched.value, gone, keepdims=0), 0, len(left))
        others, more = self.product([factor for factor in term if not factor.axes & reading.over])
        both = sorted({*left, *more})
        parts = [self._spread(left, total, both), self._spread(more, others, both)]
        labels = [axis for joined in reading.axes for axis in joined]
        order = [axis for axis in labels if axis in both]
        result = moved(self.nodes, self._joined("Mul", parts), 0)
        value = self.nodes.transposed(result.value, [0, *(1 + both.index(axis) for axis in order)])
        lacking = [1 + place for place, joined in enumerate(reading.axes) if not set(joined) & set(both)]
        return BatchedValue(self.nodes.unsqueezed(value, lacking), 0, len(reading.axes))

    def in_every_step(self, batched: BatchedValue) -> BatchedValue:
        """A value that has time: one that is the same in each step is repeated along a new first axis."""
        if batched.axis is not None:
            return batched
        nodes = self.nodes
        shape = (
            nodes.op("Concat", self.length, nodes.ints(*[1] * batched.rank), axis=0)
            if batched.rank
            else self.length
        )
        return BatchedValue(nodes.op("Expand", nodes.unsqueezed(batched.value, [0]), shape), 0, batched.rank)

    def _joined(self, op: str, parts: Sequence[BatchedValue]) -> BatchedValue:
        """The sum or product of values of one rank; those without time are joined first, as they are smaller."""
        parts = sorted(parts, key=lambda part: part.axis is not None)
        total = parts[0]
        for part in parts[1:]:
            if total.axis is None and part.axis is not None:
                value = self.nodes.unsqueezed(total.value, [part.axis])
                total = BatchedValue(self.nodes.op(op, part.value, value), part.axis, part.rank)
            else:
                other = part if total.axis is None else moved(self.nodes, part, total.axis)
                total = BatchedValue(self.nodes.op(op, total.value, other.value), total.axis, total.rank)
        return total

    def _spread(
        self, labels: Sequence[int | None], batched: BatchedValue, axes: Sequence[int]
    ) -> BatchedValue:
        """A factor with exactly these axes of the state, in this order."""
        nodes = self.nodes
        kept = [place for place, label in enumerate(labels) if label is not None]
        names = [label for label in labels if label is not None]
        if len(kept) < batched.rank:
            batched = moved(nodes, batched, 0)
            gone = [place + (batched.axis is not None) for place in range(batched.rank) if place not in kept]
            batched = BatchedValue(
                nodes.op("Squeeze", batched.value, nodes.ints(*gone)), batched.axis, len(kept)
            )
        if names != sorted(names):
            batched = moved(nodes, batched, 0)
            front = [] if batched.axis is None else [0]
            order = [names.index(name) + len(front) for name in sorted(names)]
            batched = BatchedValue(
                nodes.transposed(batched.value, [*front, *order]), batched.axis, batched.rank
            )
            names = sorted(names)
        missing = [place for place, axis in enumerate(axes) if axis not in names]
        if not missing:
            return batched
        if batched.axis is None:
            return BatchedValue(nodes.unsqueezed(batched.value, missing), None, len(axes))
        at = list(axes).index(names[batched.axis - 1]) + 1 if batched.axis else 0
        places = [place + (place >= at) for place in missing]
        return BatchedValue(nodes.unsqueezed(batched.value, places), at, len(axes))


def _source(nodes: GraphBuilder, boundary: ir.Node) -> BatchedValue:
    """The sequence that an element is taken from, first step first."""
    value, axis = boundary.inputs[0], integer(boundary, "axis")
    if value is None or boundary.outputs[0].shape is None:
        raise RefusedError("a sequence of unknown shape")
    if integer(boundary, "backwards"):
        value = flipped(nodes, value, axis)
    return BatchedValue(value, axis, len(boundary.outputs[0].shape))
