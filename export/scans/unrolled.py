"""`several_steps`: a loop region whose iterations take several steps each, so that a runtime starts an iteration less
often.

    before   Element(x)[d] ─▶ a = f(x) ─▶ h' = a * h ─▶ y = g(h')                     an iteration is a step
    after    Element(x)[u, d] ─▶ a[u] = f(x) ─▶ h1 = a[0] * h, h2 = a[1] * h1, … ─▶ y[u] = g(h1, h2, …)

Only the path from state to state is written step by step; what comes before it (no state yet) and after it (no further
state) is computed for all steps of an iteration at once. Any length is allowed: the last iteration is filled up with
zeros, surplus results are cut off, and the last states are those after the last real step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import onnx_ir as ir

from moe_export.errors import RefusedError
from moe_export.export.scans.batched import BatchedOverTime, BatchedValue, can, flipped, moved
from moe_export.export.scans.filling import Filling
from moe_export.export.scans.loop_region import LoopRegion, integer
from moe_export.export.tracing.traced_loops import DOMAIN, ELEMENT, END, STATE
from moe_export.graph_builder import GraphBuilder


def several_steps(loop: LoopRegion, steps: int) -> ir.Node:
    """Rewrite a loop with several steps per iteration.

    Returns:
        The end of the new loop. The old one is left without users.

    Raises:
        RefusedError: An operator of the step cannot be batched over time; the graph still computes what it did.
    """
    return _Writer(loop, steps).write()


def _split_body(loop: LoopRegion) -> tuple[list[ir.Node], list[ir.Node], list[ir.Node]]:
    """The body's nodes in graph order: on the path from state to state, before it (no state), and after it."""
    dependent = loop.dependent()
    wanted: set[ir.Value] = set(loop.following)
    path: list[ir.Node] = []
    for node in reversed(loop.body):
        if any(output in wanted for output in node.outputs) and node.outputs[0] in dependent:
            path.append(node)
            wanted.update(value for value in node.inputs if value is not None)
    path.reverse()
    ahead = [node for node in loop.body if node.outputs[0] not in dependent]
    behind = [node for node in loop.body if node.outputs[0] in dependent and node not in path]
    return path, ahead, behind


class _Writer:
    def __init__(self, loop: LoopRegion, steps: int) -> None:
        if not loop.elements or not loop.states:
            raise RefusedError("a loop without sequences or states")
        self._loop, self._steps = loop, steps
        self._nodes = GraphBuilder.in_front_of(loop.end, f"iterations_{loop.number}")
        path, ahead, behind = _split_body(loop)
        if not all(can(node) for node in loop.body):
            raise RefusedError("an operator of the step cannot be batched over time")
        self._path = [value for node in path for value in node.outputs]
        self._ahead = {value for node in ahead for value in node.outputs}
        self._behind = {value for node in behind for value in node.outputs}
        self._parts: dict[ir.Value, Sequence[ir.Value]] = {}
        self._joined: dict[ir.Value, ir.Value] = {}
        self._boundaries: list[ir.Node] = []
        self._last_step: ir.Value | None = None  # the place of the last real step in an iteration, (1,)

    def write(self) -> ir.Node:
        """The end of the new loop."""
        nodes, loop = self._nodes, self._loop
        first = loop.elements[0]
        axis = integer(first, "axis")
        self._length = nodes.op("Shape", first.inputs[0], start=axis, end=axis + 1)
        self._filling = Filling(nodes, self._length, self._steps)
        elements = {boundary.outputs[0]: self._element(boundary) for boundary in loop.elements}
        at = min(one.axis or 0 for one in elements.values())
        states = [self._state(boundary, at) for boundary in loop.states]
        over = BatchedOverTime(nodes, elements, self._ahead)
        columns, following = self._written_out(states, over)

        def whole(value: ir.Value) -> BatchedValue:
            return self._column(columns[value]) if value in columns else over.of(value)

        behind = BatchedOverTime(nodes, {}, self._behind, whole)
        last = [
            self._last(column) if _is_used(loop.end, place) else column[-1]
            for place, column in enumerate(following)
        ]
        collected = [self._collected(behind.of(value), place) for place, value in enumerate(loop.collected)]
        return self._end(states, last, collected)

    # Into the iteration

    def _element(self, boundary: ir.Node) -> BatchedValue:
        """The steps of an iteration, (…, u, …); axes of unknown size come before u."""
        nodes, source = self._nodes, boundary.inputs[0]
        shape = boundary.outputs[0].shape
        if source is None or shape is None:
            raise RefusedError("a sequence of unknown shape")
        axis = integer(boundary, "axis")
        if integer(boundary, "backwards"):
            source = flipped(nodes, source, axis)
        free = [place for place, size in enumerate(shape) if not isinstance(size, int)]
        at = max(axis, 1 + max(free, default=-1))
        batched = moved(nodes, BatchedValue(source, axis, len(shape)), at)
        value = self._filling.behind(batched.value, at, len(shape) + 1)
        sizes = [int(size) for size in shape[at:]]  # type: ignore[arg-type]
        value = nodes.op("Reshape", value, nodes.ints(*[0] * at, -1, self._steps, *sizes))
        value = nodes.transposed(value, [at, *range(at), *range(at + 1, len(shape) + 2)])
        size: list[Any] = [*shape[:at], self._steps, *shape[at:]]
        return BatchedValue(self._boundary(ELEMENT, value, size, source.type), at, len(shape))

    def _boundary(self, kind: str, value: ir.Value, shape: Sequence[Any], dtype: Any) -> ir.Value:
        numbers: dict[str, Any] = {
            "loop": self._loop.number,
            "place": len(self._boundaries),
            "axis": 0,
            "backwards": 0,
        }
        output = self._nodes.op(kind, value, domain=DOMAIN, **numbers)
        output.shape, output.type = ir.Shape(shape), dtype
        self._boundaries.append(self._nodes.nodes[-1])
        return output

    def _state(self, boundary: ir.Node, at: int) -> BatchedValue:
        """A state with an axis of size 1 for time, so that no step has to add or drop one."""
        shape, value = boundary.outputs[0].shape, boundary.inputs[0]
        if shape is None or value is None:
            raise RefusedError("a state of unknown shape")
        place = min(at, len(shape))
        size: list[Any] = [*shape[:place], 1, *shape[place:]]
        value = self._nodes.unsqueezed(value, [place])
        return BatchedValue(self._boundary(STATE, value, size, boundary.outputs[0].type), place, len(shape))

    # From state to state

    def _written_out(
        self, states: Sequence[BatchedValue], over: BatchedOverTime
    ) -> tuple[dict[ir.Value, list[BatchedValue]], list[list[BatchedValue]]]:
        """Write the path from state to state step by step; each of its values in each step, and the states after it."""
        boundaries = [boundary.outputs[0] for boundary in self._loop.states]
        columns: dict[ir.Value, list[BatchedValue]] = {value: [] for value in (*boundaries, *self._path)}
        following: list[list[BatchedValue]] = [[] for _ in boundaries]
        now = list(states)
        for step in range(self._steps):
            known = dict(zip(boundaries, now, strict=True))
            inside = BatchedOverTime(self._nodes, known, set(self._path), partial(self._part, over, step))
            for value, column in columns.items():
                column.append(inside.of(value))
            reached = [inside.of(value) for value in self._loop.following]
            if any(new.axis is None for new in reached):
                raise RefusedError("a state that is the same after each step")
            now = [moved(self._nodes, new, old.axis or 0) for new, old in zip(reached, states, strict=True)]
            for column, new in zip(following, now, strict=True):
                column.append(new)
        return columns, following

    def _part(self, over: BatchedOverTime, step: int, value: ir.Value) -> BatchedValue:
        """One step's part of a value that all steps of the iteration have."""
        batched = over.of(value)
        if batched.axis is None:
            return batched
        if batched.value not in self._parts:
            sizes = self._nodes.ints(*[1] * self._steps)
            parts = self._nodes.many("Split", batched.value, sizes, outputs=self._steps, axis=batched.axis)
            self._parts[batched.value] = parts
        return BatchedValue(self._parts[batched.value][step], batched.axis, batched.rank)

    def _column(self, column: Sequence[BatchedValue]) -> BatchedValue:
        """The values of all steps of an iteration, joined along time."""
        key = column[0].value
        if column[0].axis is None:
            raise RefusedError("a value on the path from state to state is the same in each step")
        if key not in self._joined:
            values = [one.value for one in column]
            self._joined[key] = self._nodes.op("Concat", *values, axis=column[0].axis)
        return BatchedValue(self._joined[key], column[0].axis, column[0].rank)

    def _last(self, column: Sequence[BatchedValue]) -> BatchedValue:
        """The state after the last real step: the last iteration may have fewer than the others."""
        nodes = self._nodes
        if self._last_step is None:
            steps = nodes.scalar(self._steps)
            starts = nodes.op(
                "Range", nodes.scalar(0), nodes.op("Squeeze", self._length, nodes.ints(0)), steps
            )
            here = nodes.op("Min", nodes.op("Sub", self._length, starts), steps)
            places = nodes.op("Unsqueeze", nodes.op("Sub", here, nodes.scalar(1)), nodes.ints(1))
            self._last_step = self._boundary(ELEMENT, places, [1], places.type)
        joined = self._column(column)
        return BatchedValue(
            nodes.op("Gather", joined.value, self._last_step, axis=joined.axis), joined.axis, joined.rank
        )

    # Out of the iteration

    def _collected(self, batched: BatchedValue, place: int) -> tuple[ir.Value, int]:
        """What an iteration returns, and the axis of its steps, which comes after all axes of unknown size."""
        shape = self._loop.collected[place].shape
        if batched.axis is None or shape is None:
            raise RefusedError("a result is the same in each step")
        free = [at for at, size in enumerate(shape) if not isinstance(size, int)]
        at = max(self._loop.axes[place], 1 + max(free, default=-1))
        return moved(self._nodes, batched, at).value, at

    def _end(
        self,
        states: Sequence[BatchedValue],
        last: Sequence[BatchedValue],
        collected: Sequence[tuple[ir.Value, int]],
    ) -> ir.Node:
        loop, nodes = self._loop, self._nodes
        boundaries = [node for node in self._boundaries if node.op_type == STATE]
        elements = [node for node in self._boundaries if node.op_type == ELEMENT]
        inputs = [node.outputs[0] for node in (*boundaries, *elements)]
        numbers: dict[str, Any] = {
            "states": len(boundaries), "elements": len(elements), "loop": loop.number,
            "axes": [0] * max(1, len(collected)), "backwards": [0] * max(1, len(collected)),
        }  # fmt: skip
        results = [*(one.value for one in last), *(value for value, _ in collected)]
        given = nodes.many(END, *inputs, *results, outputs=len(results), domain=DOMAIN, **numbers)
        end = nodes.nodes[-1]
        for number, (old, new) in enumerate(zip(loop.end.outputs, given, strict=True)):
            new.type = old.type
            if number < len(states):
                new.shape = boundaries[number].outputs[0].shape
                result = nodes.op("Squeeze", new, nodes.ints(states[number].axis or 0))
            else:
                result = self._unrolled(new, number - len(states), collected[number - len(states)][1])
            result.shape, result.type = old.shape, old.type
            old.replace_all_uses_with(result, replace_graph_outputs=True)
        return end

    def _unrolled(self, value: ir.Value, place: int, at: int) -> ir.Value:
        """What all iterations return, as one sequence of steps: (iteration, …, u, …) → (…, l, …)."""
        nodes, loop = self._nodes, self._loop
        shape = loop.collected[place].shape
        assert shape is not None
        rank = len(shape)
        value = nodes.transposed(value, [*range(1, at + 1), 0, *range(at + 1, rank + 2)])
        sizes = [int(size) for size in shape[at:]]  # type: ignore[arg-type]
        value = nodes.op("Reshape", value, nodes.ints(*[0] * at, -1, *sizes))
        value = nodes.op("Slice", value, nodes.ints(0), self._length, nodes.ints(at))
        axis = loop.axes[place]
        value = moved(nodes, BatchedValue(value, at, rank), axis).value
        return flipped(nodes, value, axis) if loop.backwards[place] else value


def _is_used(end: ir.Node, place: int) -> bool:
    output = end.outputs[place]
    return bool(output.uses()) or output.is_graph_output()
