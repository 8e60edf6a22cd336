"""What a folded loop returns: its last states, and values of every iteration, stacked along an axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from moe_export.export.recurrence.fold_body import Outer
from moe_export.export.recurrence.form import moved, scaled
from moe_export.export.recurrence.loop import WRITE, Carried, Local, Loop, Made, Outside
from moe_export.export.recurrence.loop_body import Along
from moe_export.export.recurrence.operand import SELECT, SLICE, View
from moe_export.export.recurrence.rolled import Call, Folded, LengthError, RolledGraph, Row, Whole

aten = torch.ops.aten


class Collected:
    """What a loop returns besides its last states: operands of the body, stacked along an axis."""

    def __init__(self, number: int, loop: Loop) -> None:
        self._number, self._loop = number, loop
        self._columns: dict[tuple[Any, Along], int] = {}
        self.states: Mapping[Carried, int] = {}

    def operands(self) -> list[Any]:
        """The operands to collect, in order."""
        return [operand for operand, _ in self._columns]

    def alongs(self) -> list[Along]:
        """For each operand, where its axis of time goes."""
        return [along for _, along in self._columns]

    def want(self, operand: Any, along: Along) -> None:
        """Record that something outside reads an operand of every iteration."""
        self._columns.setdefault((operand, along), len(self._columns))

    def column(self, outer: Outer, operand: Any, along: Along) -> fx.Node:
        """The node of an operand of every iteration, stacked."""
        return outer.result(self._number, len(self.states) + self._columns[operand, along])

    def is_last(self, made: Made) -> bool:
        """Whether a value is carried, and that of the last iteration: then it is one of the loop's last states."""
        return made.iteration == moved(self._loop.iterations, -1) and any(
            start.carried == Carried(made.position, made.part, 1) for start in self._loop.starts
        )

    def made(self, outer: Outer, made: Made) -> fx.Node:
        """The value of one iteration; of every iteration, stacked, if the iteration is None."""
        if self.is_last(made):
            return outer.result(self._number, self.states[Carried(made.position, made.part, 1)])
        column = self.column(outer, Local(made.position, made.part), Along(0))
        if made.iteration is None:
            return column
        return outer.viewed(column, (View(SELECT, (0, made.iteration)),))

    def row(self, outer: Outer, row: Row, item: Call) -> fx.Node:
        """The values of all iterations, or of consecutive ones, as `item` joins them."""
        operand, along, flat = _row_column(row, item, self._loop)
        node = self.column(outer, operand, along)
        if row.first != 0 or row.count != self._loop.iterations:
            first = row.first
            if row.backwards:  # the last iteration comes first
                first = moved(self._loop.iterations, scaled(moved(row.first, row.count), -1))
            end = moved(first, row.count)
            node = outer.viewed(node, (View(SLICE, (along.axis, first, end, 1)),))
        return outer.call(aten.flatten.using_ints, node, along.axis, along.axis + 1) if flat else node

    def buffer(self, outer: Outer, position: int) -> fx.Node:
        """A written or appended buffer as it is after the loop."""
        write = _write(self._loop, position)
        node = self.column(outer, write.operand, write.along)
        if write.flat:
            axis = write.along.axis
            node = outer.call(aten.flatten.using_ints, node, axis, axis + 1)
        if write.first == 0 and write.covered == write.size:
            return node
        before = outer.value(write.start)
        if self._loop.written[position].kind != WRITE:
            empty = self._loop.written[position].size == 0
            return node if empty else outer.call(aten.cat.default, [before, node], write.along.axis)
        if write.stride != 1:
            last = moved(scaled(moved(self._loop.iterations, -1), write.stride), write.first)
            return outer.call(
                aten.slice_scatter.default, before, node, write.along.axis,
                outer.number(write.first), outer.number(moved(last, 1)), write.stride,
            )  # fmt: skip
        return self._between(outer, write, before, node)

    def _between(self, outer: Outer, write: _Write, before: fx.Node, node: fx.Node) -> fx.Node:
        """The part of a buffer before what was written, what was written, and the part after it."""
        axis = write.along.axis
        parts = [node]
        if write.first != 0:
            parts.insert(0, outer.viewed(before, (View(SLICE, (axis, 0, write.first, 1)),)))
        end = moved(write.first, write.covered)
        if end != write.size:
            parts.append(outer.viewed(before, (View(SLICE, (axis, end, 2**63 - 1, 1)),)))
        return outer.call(aten.cat.default, parts, axis)


@dataclasses.dataclass(frozen=True)
class _Write:
    """How a loop fills a buffer: with `operand` of each iteration along an axis, from `first` on, `stride` apart.

    Attributes:
        flat: Whether an iteration writes several places, so that time and the axis are joined afterwards.
        covered: How many places are written in all.
        size: The buffer's size along the axis; None if it is appended to, or symbolic.
        start: The buffer before the loop.
    """

    operand: Any
    along: Along
    flat: bool
    first: Any
    covered: Any
    stride: int
    size: Any
    start: Outside


def _write(loop: Loop, position: int) -> _Write:
    step = loop.body[position]
    start = next(start for start in loop.starts if start.carried == Carried(position, (), 1)).values[0]
    written = loop.written[position]
    if written.kind != WRITE:
        axis = step.args[1] if len(step.args) > 1 else 0
        return _Write(
            step.args[0][1],
            Along(_positive(axis, loop, position)),
            True,
            written.size,
            loop.iterations,
            1,
            None,
            start,
        )
    axis = _positive(step.args[2], loop, position)
    first, width = step.args[3], 1
    flat = step.target is aten.slice_scatter.default
    if flat:
        width = moved(step.args[4].first, scaled(first.first, -1))
        if step.args[4].step != first.step or width not in (1, abs(first.step)):
            raise LengthError("a step writes over part of what the step before it wrote", loop.line)
    low = first.first
    if first.step < 0:
        low = moved(low, scaled(moved(loop.iterations, -1), first.step))
    stride = 1 if width == abs(first.step) else abs(first.step)
    covered = scaled(loop.iterations, width)
    return _Write(step.args[1], Along(axis, first.step < 0), flat, low, covered, stride, written.size, start)


def _positive(axis: Any, loop: Loop, position: int) -> int:
    node = loop.nodes[0][position]
    assert node is not None
    return int(axis) % len(node.meta["val"].shape)


def _row_column(row: Row, item: Call, loop: Loop) -> tuple[Any, Along, bool]:
    """What to collect for a row: the operand, the axis, and whether that axis is to be joined with the next."""
    axis = item.args[1] if len(item.args) > 1 else item.kwargs.get("dim", 0)
    axis = int(axis) % len(item.node.meta["val"].shape)
    if item.target is aten.stack.default:
        return Local(row.position, row.path), Along(axis, row.backwards), False
    if item.target is not aten.cat.default:
        raise LengthError(f"{item.target} takes the values of all steps: only stack and cat can", loop.line)
    return Local(row.position, row.path), Along(axis, row.backwards), True


def outputs_of(rolled: RolledGraph) -> dict[int, Collected]:
    """For each loop, what must be collected because the rest of the rolled graph reads it."""
    loops = {item.number: item.loop for item in rolled.items if isinstance(item, Folded)}
    found = {number: Collected(number, loop) for number, loop in loops.items()}
    for item in rolled.items:
        rows = [item.args, item.kwargs] if isinstance(item, Call) else [item.loop.body, item.loop.starts]
        for part in _parts(rows):
            _want(part, item, found, loops)
    for part in _parts(rolled.outputs):
        _want(part, None, found, loops)
    return found


def _want(part: Any, item: Any, found: dict[int, Collected], loops: dict[int, Loop]) -> None:
    if isinstance(part, Row):
        operand, along, _ = _row_column(part, item, loops[part.loop])
        found[part.loop].want(operand, along)
    elif isinstance(part, Whole):
        write = _write(loops[part.loop], part.position)
        found[part.loop].want(write.operand, write.along)
    elif isinstance(part, Made) and not found[part.loop].is_last(part):
        found[part.loop].want(Local(part.position, part.part), Along(0))


def _parts(value: Any) -> Iterator[Any]:
    """Every row, buffer and value of an iteration inside nested data."""
    if isinstance(value, (Row, Whole, Made)):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _parts(child)
    elif isinstance(value, (tuple, list)):
        for child in value:
            yield from _parts(child)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.compare:
                yield from _parts(getattr(value, field.name))
