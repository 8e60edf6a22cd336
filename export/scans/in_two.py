"""`in_two`: a loop whose first states read no other state becomes two loops, one after the other.

    before   m' = max(m + f, i)   C' = exp(m + f - m') C + exp(i - m') k v        one loop, not linear in its states
    after    m' = max(m + f, i)                                                   a loop that collects every m and m'
             C' = exp(m + f - m') C + exp(i - m') k v                             a loop that reads them as sequences

The second one may be a linear recurrence where the whole is none: mLSTM (arXiv:2405.04517), whose running maximum keeps
its exponentials small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from moe_export.export.onnx.bodies import bodies, reads
from moe_export.export.scans.batched import size_of
from moe_export.export.scans.loop_region import LoopRegion, integer
from moe_export.export.tracing.traced_loops import DOMAIN, ELEMENT, END, STATE
from moe_export.graph_builder import GraphBuilder

_SMALLER = 16  # what is written for each step is small beside the states that the steps would otherwise write


def in_two(graph: ir.Graph, loop: LoopRegion) -> tuple[ir.Node, ir.Node] | None:
    """Write a loop as two, in front of it; it stays as it is, and stays used.

    Returns:
        The ends of the two; None where no state is read by another one, all depend on each other, or the first ones
        are not much smaller.
    """
    firsts = _firsts(loop)
    others = [number for number in range(len(loop.states)) if number not in firsts]
    if not firsts or not others or any(bodies(node) for node in loop.body):
        return None
    if any(boundary.outputs[0].shape is None for boundary in (*loop.states, *loop.elements)):
        return None
    if _SMALLER * _entries(loop, firsts) > _entries(loop, others):
        return None
    return _Writer(graph, loop, firsts, others).write()


def first_and_second(loop: LoopRegion, first: ir.Node, second: ir.Node) -> Sequence[ir.Value]:
    """What the loop's outputs are, given the ends of the two that stand for it."""
    firsts = _firsts(loop)
    early, late = iter(first.outputs), iter(second.outputs)
    states = [next(early if number in firsts else late) for number in range(len(loop.states))]
    return [*states, *late]


def _entries(loop: LoopRegion, states: Iterable[int]) -> int:
    return sum(size_of(tuple(loop.states[number].outputs[0].shape or ())) for number in states)


def _firsts(loop: LoopRegion) -> list[int]:
    """The states that others are computed from, and what these are computed from."""
    sources = {boundary.outputs[0]: {number} for number, boundary in enumerate(loop.states)}
    for node in loop.body:
        found = set().union(*(sources.get(value, set()) for value in reads(node)))
        sources.update(dict.fromkeys(node.outputs, found))
    read = [sources.get(value, set()) for value in loop.following]
    firsts = set().union(*(states - {number} for number, states in enumerate(read)))
    while not (more := set().union(*(read[number] for number in firsts))) <= firsts:
        firsts |= more
    return sorted(firsts)


class _Writer:
    def __init__(
        self, graph: ir.Graph, loop: LoopRegion, firsts: Sequence[int], others: Sequence[int]
    ) -> None:
        self._graph, self._loop, self._firsts, self._others = graph, loop, firsts, others
        self._axis = loop.axes[0] if loop.axes else 0

    def write(self) -> tuple[ir.Node, ir.Node]:
        loop = self._loop
        results = [*(loop.following[number] for number in self._others), *loop.collected]
        parted = {loop.states[number].outputs[0] for number in self._firsts}
        parted |= {loop.following[number] for number in self._firsts}
        read = self._needed(results, parted)
        shared = [value for value in parted if value in read]
        numbers = (integer(node, "loop") for node in self._graph if node.domain == DOMAIN)
        first = self._end(1 + max(numbers), self._firsts, {}, shared, [self._axis_of(one) for one in shared])
        columns = dict(zip(shared, first.outputs[len(self._firsts) :], strict=True))
        return first, self._end(loop.number, self._others, columns, loop.collected, loop.axes, loop.backwards)

    def _axis_of(self, value: ir.Value) -> int:
        return min(self._axis, len(value.shape or ()))

    def _needed(self, results: Iterable[ir.Value], known: Iterable[ir.Value]) -> set[ir.Value]:
        """What these results are computed from, up to what is known."""
        wanted, known = set(results), set(known)
        for node in reversed(self._loop.body):
            if any(value in wanted and value not in known for value in node.outputs):
                wanted.update(reads(node))
        return wanted

    def _end(
        self,
        number: int,
        states: Sequence[int],
        columns: Mapping[ir.Value, ir.Value],
        collected: Sequence[ir.Value],
        axes: Sequence[int],
        backwards: Sequence[bool] = (),
    ) -> ir.Node:
        """A loop of some of the states that reads others as sequences.

        Args:
            number: Of the new loop.
            states: Which ones.
            columns: Values of a step that are known for all steps.
            collected: What it returns besides its states.
            axes: Where the axis of time of these goes.
            backwards: Which of these have the last step first.
        """
        loop = self._loop
        nodes = GraphBuilder.in_front_of(loop.end, f"part_{number}")
        following = [loop.following[state] for state in states]
        needed = self._needed([*following, *collected], columns)
        inside: dict[ir.Value, ir.Value] = {}
        ways: list[tuple[str, ir.Value, ir.Value, int, int]] = []
        for state in states:
            boundary = loop.states[state]
            ways.append((STATE, boundary.outputs[0], _given(boundary), 0, 0))
        used = [boundary for boundary in loop.elements if boundary.outputs[0] in needed]
        for boundary in used or loop.elements[: not columns]:
            place, backward = integer(boundary, "axis"), integer(boundary, "backwards")
            ways.append((ELEMENT, boundary.outputs[0], _given(boundary), place, backward))
        ways += [(ELEMENT, value, sequence, self._axis_of(value), 0) for value, sequence in columns.items()]
        inputs = []
        for place, (kind, value, source, axis, backward) in enumerate(ways):
            numbers: dict[str, Any] = {"loop": number, "place": place, "axis": axis, "backwards": backward}
            new = nodes.op(kind, source, domain=DOMAIN, **numbers)
            new.shape, new.type = value.shape, value.type
            inside[value] = new
            inputs.append(new)
        for node in loop.body:
            if any(value in needed and value not in inside for value in node.outputs):
                copies = nodes.copy(
                    node, [inside.get(value, value) if value else None for value in node.inputs]
                )
                for value, copy in zip(node.outputs, copies, strict=True):
                    copy.shape = value.shape
                    inside.setdefault(value, copy)
        results = [inside.get(value, value) for value in (*following, *collected)]
        attributes: dict[str, Any] = {
            "loop": number,
            "states": len(states),
            "elements": len(ways) - len(states),
            "axes": [*axes] or [0],
            "backwards": [int(flag) for flag in backwards] or [0] * max(1, len(axes)),
        }
        given = nodes.many(END, *inputs, *results, outputs=len(results), domain=DOMAIN, **attributes)
        for output, value in zip(given, results, strict=True):
            output.type, output.shape = value.type, value.shape
        for output, value, axis in zip(given[len(states) :], collected, axes, strict=True):
            sizes = list(value.shape or ())
            output.shape = ir.Shape([*sizes[:axis], self._length(), *sizes[axis:]])
        end = given[0].producer()
        assert end is not None
        return end

    def _length(self) -> int | ir.SymbolicDim:
        boundary = self._loop.elements[0]
        shape = _given(boundary).shape
        return shape[integer(boundary, "axis")] if shape is not None else ir.SymbolicDim(None)


def _given(boundary: ir.Node) -> ir.Value:
    value = boundary.inputs[0]
    assert value is not None
    return value
