"""The parts of a folded loop: its body's graph, the sequences it runs over, and what it collects."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import fx

from moe_export.export.form import Form, moved, scaled
from moe_export.export.loop import WRITE, Carried, Local, Loop, Made, Outside, Turning
from moe_export.export.loop_body import Along
from moe_export.export.operand import PART, SELECT, SLICE, View
from moe_export.export.skeleton import Call, Folded, LengthError, Place, Row, Size, Skeleton, Value, Whole

aten = torch.ops.aten

_WIDEST_WINDOW = 64
_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


class Outer(Protocol):
    """What the parts of a loop need of the graph around it."""

    graph: fx.Graph

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node: ...
    def number(self, number: Any) -> Any: ...
    def value(self, value: Any) -> fx.Node: ...
    def viewed(self, node: fx.Node, path: tuple[View, ...]) -> fx.Node: ...
    def result(self, loop: int, index: int) -> fx.Node: ...
    def loop(self, number: int) -> Loop: ...
    def item(self, place: Place) -> Any: ...


def kept_meta(node: fx.Node | None) -> dict[str, Any]:
    """Where a node comes from, for the node that stands for it."""
    return {key: node.meta[key] for key in _KEPT_META if key in node.meta} if node is not None else {}


def view_call(call: Callable[..., fx.Node], node: fx.Node, view: View, numbers: list[Any]) -> fx.Node:
    """Write one view."""
    if view.kind == PART:
        return call(operator.getitem, node, *numbers)
    return call(aten.select.int if view.kind == SELECT else aten.slice.Tensor, node, *numbers)


class Collected:
    """What a loop hands out besides its last states: operands of the body, stacked along an axis."""

    def __init__(self, number: int, loop: Loop) -> None:
        self._number, self._loop = number, loop
        self._columns: dict[tuple[Any, Along], int] = {}
        self.states: Mapping[Carried, int] = {}

    def operands(self) -> list[Any]:
        """The operands to collect, in order."""
        return [operand for operand, _ in self._columns]

    def alongs(self) -> list[Along]:
        """Where the time axis of each goes."""
        return [along for _, along in self._columns]

    def want(self, operand: Any, along: Along) -> None:
        """Note that somebody outside needs an operand of every turn."""
        self._columns.setdefault((operand, along), len(self._columns))

    def column(self, outer: Outer, operand: Any, along: Along) -> fx.Node:
        """An operand of every turn, stacked."""
        return outer.result(self._number, len(self.states) + self._columns[operand, along])

    def is_last(self, made: Made) -> bool:
        """Whether a value is that of the last turn, and a carried one."""
        return made.turn == moved(self._loop.turns, -1) and any(
            start.carried == Carried(made.position, made.part, 1) for start in self._loop.starts
        )

    def made(self, outer: Outer, made: Made) -> fx.Node:
        """The value of one turn; of every turn, stacked, if the turn is None."""
        if self.is_last(made):
            return outer.result(self._number, self.states[Carried(made.position, made.part, 1)])
        column = self.column(outer, Local(made.position, made.part), Along(0))
        if made.turn is None:
            return column
        return outer.viewed(column, (View(SELECT, (0, made.turn)),))

    def row(self, outer: Outer, row: Row, item: Call) -> fx.Node:
        """The values of all turns, or of some that follow each other, as `item` joins them."""
        operand, along, flat = _row_column(row, item, self._loop)
        node = self.column(outer, operand, along)
        if row.first != 0 or row.count != self._loop.turns:
            first = row.first
            if row.backwards:  # the last turn stands first
                first = moved(self._loop.turns, scaled(moved(row.first, row.count), -1))
            end = moved(first, row.count)
            node = outer.viewed(node, (View(SLICE, (along.axis, first, end, 1)),))
        return outer.call(aten.flatten.using_ints, node, along.axis, along.axis + 1) if flat else node

    def buffer(self, outer: Outer, position: int) -> fx.Node:
        """A buffer as it is after the loop."""
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
            last = moved(scaled(moved(self._loop.turns, -1), write.stride), write.first)
            return outer.call(
                aten.slice_scatter.default, before, node, write.along.axis,
                outer.number(write.first), outer.number(moved(last, 1)), write.stride,
            )  # fmt: skip
        return self._between(outer, write, before, node)

    def _between(self, outer: Outer, write: _Write, before: fx.Node, node: fx.Node) -> fx.Node:
        """The part of a buffer before what was written, what was written, and the part behind."""
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
    """How a loop fills a buffer: `operand` of each turn along an axis, from `first` on, `stride` apart."""

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
            loop.turns,
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
            raise LengthError("the loop writes over what it wrote the step before", loop.line)
    low = first.first
    if first.step < 0:
        low = moved(low, scaled(moved(loop.turns, -1), first.step))
    stride = 1 if width == abs(first.step) else abs(first.step)
    covered = scaled(loop.turns, width)
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
        raise LengthError(f"{item.target} takes what a loop makes in every step", loop.line)
    return Local(row.position, row.path), Along(axis, row.backwards), True


def outputs_of(skeleton: Skeleton) -> dict[int, Collected]:
    """What must be collected from each loop, as the rest of the skeleton reads it."""
    loops = {item.number: item.loop for item in skeleton.items if isinstance(item, Folded)}
    found = {number: Collected(number, loop) for number, loop in loops.items()}
    for item in skeleton.items:
        rows = [item.args, item.kwargs] if isinstance(item, Call) else [item.loop.body, item.loop.starts]
        for part in _parts(rows):
            _want(part, item, found, loops)
    for part in _parts(skeleton.outputs):
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
    """Every row, buffer and value of a turn inside nested data."""
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


class BodyWriter:
    """Writes one turn as a graph: states, elements and captured values in, next states and collected values out.

    Attributes:
        initial: Nodes outside that the states start from.
        sequences: Nodes outside that the loop runs over, with the axis of each in `alongs`.
        captured: Nodes outside that are the same in every turn.
        states: The index of each carried value.
    """

    def __init__(self, outer: Outer, loop: Loop) -> None:
        self._outer, self._loop = outer, loop
        self.graph = fx.Graph()
        self.initial: list[Any] = []
        self.sequences: list[fx.Node] = []
        self.alongs: list[Along] = []
        self.captured: list[Any] = []
        self.states: dict[Carried, int] = {}
        self._inputs: dict[tuple[str, Any], fx.Node] = {}
        self._order: dict[str, list[fx.Node]] = {"state": [], "element": [], "captured": []}
        self._steps: dict[int, fx.Node] = {}
        self._meta: dict[str, Any] = {}

    def write(self, collected: list[Any]) -> fx.Graph:
        """Write the graph; `collected` are operands to hand out besides the next states."""
        chains = [start for start in self._loop.starts if start.carried.position not in self._loop.written]
        chains.sort(key=lambda start: start.carried.distance)
        links: list[Any] = []  # what each state becomes: a Carried, or the state of that index
        for start in chains:
            for back in range(start.carried.distance):
                carried = dataclasses.replace(start.carried, distance=back + 1)
                if carried not in self.states:
                    self.states[carried] = len(self.initial)
                    self.initial.append(self._outer.value(start.values[start.carried.distance - 1 - back]))
                    links.append(carried)
        for index in range(len(self.initial)):
            self._input("state", index)
        for position, step in enumerate(self._loop.body):
            if position not in self._loop.written:
                self._meta = kept_meta(self._loop.nodes[0][position])
                args, kwargs = self._argument(step.args), self._argument(step.kwargs)
                self._steps[position] = self._call(step.target, *args, **kwargs)
        following = [self._next(carried) for carried in links]
        self.graph.output((*following, *(self._operand(operand) for operand in collected)))
        self._sort_inputs()
        return self.graph

    def _sort_inputs(self) -> None:
        """States, then elements, then captured values, whatever the order in which they were met."""
        body = next(node for node in self.graph.nodes if node.op != "placeholder")
        for kind in ("state", "element", "captured"):
            for node in self._order[kind]:
                body.prepend(node)

    def _next(self, carried: Carried) -> fx.Node:
        if carried.distance > 1:
            return self._input(
                "state", self.states[dataclasses.replace(carried, distance=carried.distance - 1)]
            )
        node: fx.Node = self._operand(Local(carried.position, carried.path))
        return node

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = dict(self._meta)
        return node

    def _input(self, kind: str, key: Any) -> fx.Node:
        if (kind, key) not in self._inputs:
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                node = self.graph.placeholder(f"{kind}_{len(self._order[kind])}")
            self._inputs[kind, key] = node
            self._order[kind].append(node)
        return self._inputs[kind, key]

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Mapping):
            return {key: self._argument(value) for key, value in argument.items()}
        if isinstance(argument, tuple):
            return tuple(self._argument(value) for value in argument)
        return self._operand(argument)

    def _operand(self, operand: Any) -> Any:
        if isinstance(operand, Local):
            return self._viewed(self._steps[operand.position], operand.path)
        if isinstance(operand, Carried):
            return self._input("state", self.states[operand])
        if isinstance(operand, Outside):
            return self._outside(operand)
        if isinstance(operand, (Form, Size, Value)):
            return self._capture(operand, lambda: self._outer.number(operand))
        return operand

    def _viewed(self, node: fx.Node, path: tuple[View, ...]) -> fx.Node:
        for view in path:
            node = view_call(self._call, node, view, [self._operand(number) for number in view.numbers])
        return node

    def _capture(self, key: Any, made: Any) -> fx.Node:
        known = ("captured", key) in self._inputs
        node = self._input("captured", key)
        if not known:
            self.captured.append(made())
        return node

    # Values from outside

    def _outside(self, operand: Outside) -> fx.Node:
        turning = [
            depth
            for depth, view in enumerate(operand.path)
            if any(isinstance(number, Turning) for number in view.numbers)
        ]
        base: Any = operand.base
        if isinstance(base, Made) and isinstance(base.turn, Turning):
            if turning:
                raise LengthError("an index moves with the steps of two loops", self._loop.line)
            column = self._outer_column(base)
            view = View(SELECT, (0, base.turn), self._outer.loop(base.loop).turns)
            return self._viewed(self._element(column, view), operand.path)
        if not turning:
            return self._capture(operand, lambda: self._outer.value(operand))
        if len(turning) > 1:
            raise LengthError("two indices of one value move from step to step", self._loop.line)
        depth = turning[0]
        view, rest = operand.path[depth], operand.path[depth + 1 :]
        value = Value(base, operand.path[:depth])
        if view.kind == PART:
            value, view = self._part(base, view)
        source = self._outer.value(value)
        node = self._element(source, view) if view.kind == SELECT else self._window(source, view)
        return self._viewed(node, rest)

    def _outer_column(self, base: Made) -> fx.Node:
        whole = dataclasses.replace(base, turn=None)
        return self._outer.value(Value(whole))

    def _part(self, base: Any, view: View) -> tuple[Value, View]:
        """A part of an even `split` that moves with the turns → a window that does."""
        turning = view.numbers[0]
        item = self._outer.item(base) if isinstance(base, Place) else None
        if isinstance(item, Call) and item.target is aten.split.Tensor:
            source, width, axis = (*item.args, 0)[:3]
            value = item.node.args[0].meta["val"]  # type: ignore[union-attr]
            if isinstance(source, Value) and isinstance(width, int):
                start = Turning(scaled(turning.first, width), turning.step * width)
                end = Turning(moved(start.first, width), start.step)
                return source, View(SLICE, (int(axis) % value.dim(), start, end, 1))
        raise LengthError("the loop runs over parts that are not even", self._loop.line)

    def _element(self, source: fx.Node, view: View) -> fx.Node:
        """One index a turn."""
        axis, index = view.numbers
        key = (source, axis, index)
        known = ("element", key) in self._inputs
        node = self._input("element", key)
        if not known:
            self.sequences.append(self._sequence(source, axis, index, view.size))
            self.alongs.append(Along(axis, index.step < 0))
        return node

    def _sequence(self, source: fx.Node, axis: int, index: Turning, size: Any) -> fx.Node:
        """The part of a tensor that the turns read, in ascending order."""
        turns, step = self._loop.turns, abs(index.step)
        low = index.first
        if index.step < 0:
            low = moved(low, scaled(moved(turns, -1), index.step))
        if low == 0 and step == 1 and size == turns:
            return source
        end = moved(moved(low, scaled(moved(turns, -1), step)), 1)
        return self._outer.viewed(source, (View(SLICE, (axis, low, end, step)),))

    def _window(self, source: fx.Node, view: View) -> fx.Node:
        """Several indices a turn: `x[:, t * 4 : t * 4 + 4]`, or a window that moves."""
        axis, start, end, step = view.numbers
        if not (isinstance(start, Turning) and isinstance(end, Turning) and start.step == end.step):
            raise LengthError("the loop reads a part that grows from step to step", self._loop.line)
        width = moved(end.first, scaled(start.first, -1))
        if not isinstance(width, int) or step != 1 or width > _WIDEST_WINDOW:
            raise LengthError(f"the loop reads {width} places a step", self._loop.line)
        places = [
            self._element(source, View(SELECT, (axis, Turning(moved(start.first, k), start.step)), view.size))
            for k in range(width)
        ]
        if width == 1:
            return self._call(aten.unsqueeze.default, places[0], axis)
        return self._call(aten.stack.default, places, axis)
