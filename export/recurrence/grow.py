"""`grow`: from a place where a traced graph repeats itself, the longest loop that its data flow allows.

Turn by turn, each operand must play one part: a value of the same turn, of an earlier turn, of the same place
outside, or of a place outside whose index moves by the same step. Where that ends, the loop ends; if that is before
the third turn, there is no loop, and the reason is what a user can be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moe_export.export.frontend.source import line_of
from moe_export.export.recurrence.column import holds_for, is_integer, is_number, number_of, number_or_series
from moe_export.export.recurrence.counter import counts, why_not
from moe_export.export.recurrence.law_fit import Point, fits
from moe_export.export.recurrence.loop import (
    APPEND,
    WRITE,
    Carried,
    Local,
    Loop,
    Made,
    Outside,
    Series,
    Start,
    Step,
    Turning,
    Written,
    split_part,
)
from moe_export.export.recurrence.operand import PART, SLICE, Read, View, atoms, filled, known
from moe_export.export.recurrence.period import LEAST_TURNS

aten = torch.ops.aten

_LEAVES = "leaves"
_WRITING = (aten.select_scatter.default, aten.slice_scatter.default, aten.cat.default)
Locate = Callable[[fx.Node], Made | None]


@dataclass(frozen=True)
class Refusal:
    """Why nodes that repeat are no loop.

    Attributes:
        reason: For the user, in terms of turns.
        node: Where it is seen.
        turns: How many turns the rest would allow.
        nodes: How many nodes repeat themselves there.
        of_number: Whether it is about a number that the steps compute with.
    """

    reason: str
    node: fx.Node
    turns: int
    nodes: int = 0
    of_number: bool = False


def grow(nodes: Sequence[fx.Node], start: int, period: int, stop: int, locate: Locate) -> Loop | Refusal:
    """The longest loop whose first turn is `nodes[start : start + period]`.

    Args:
        nodes: Computations in trace order.
        start: Where the first turn begins.
        period: Its number of nodes.
        stop: Where the nodes cease to repeat.
        locate: What an earlier loop made, for a node in it.
    """
    return _Growth(nodes, start, period, (stop - start) // period, locate).loop()


class _Growth:
    def __init__(self, nodes: Sequence[fx.Node], start: int, period: int, most: int, locate: Locate) -> None:
        self._nodes, self._start, self._period, self._locate = nodes, start, period, locate
        self._rows = [
            tuple(nodes[start + turn * period : start + (turn + 1) * period]) for turn in range(most)
        ]
        self._misfits: set[Carried] = set()
        self._place = {
            node: (turn, position) for turn, row in enumerate(self._rows) for position, node in enumerate(row)
        }

    def loop(self) -> Loop | Refusal:
        turns = len(self._rows)
        if turns < LEAST_TURNS:
            return Refusal("it has fewer than three turns", self._nodes[self._start], turns)
        parts: list[list[Any]] = []
        starts: dict[Carried, tuple[Outside, ...]] = {}
        for position in range(self._period):
            rows = [_leaves(row[position]) for row in self._rows]
            found = []
            for column in zip(*rows, strict=True):
                part, turns_here, reason = self._part(list(column), starts)
                if turns_here < LEAST_TURNS:
                    node = self._rows[max(turns_here, 0)][position]
                    return Refusal(reason, node, turns_here, of_number=not isinstance(column[2], Read))
                turns = min(turns, turns_here)
                found.append(part)
            parts.append(found)
        body = tuple(
            _step(node, iter([_cut(part, turns) for part in found]))
            for node, found in zip(self._rows[0], parts, strict=True)
        )
        return self._finished(body, starts, turns)

    def _finished(
        self, body: tuple[Step, ...], starts: dict[Carried, tuple[Outside, ...]], turns: int
    ) -> Loop | Refusal:
        written = {
            position: Written(kind, _buffer_size(self._rows[0][position], kind))
            for position in range(len(body))
            if (kind := _writes(body, position))
        }
        for position, step in enumerate(body):
            if position not in written and any(counts(leaf) for leaf in atoms_of(step)):
                reason = why_not(step, self._rows[1][position])
                if reason is not None:
                    return Refusal(reason, self._rows[1][position], turns)
        for carried in self._misfits:
            if carried.position not in written:
                return Refusal(
                    "its first turn starts from a value of another shape or type",
                    self._rows[0][carried.position], 0,
                )  # fmt: skip
        last = self._unfinished_turn(body, starts, turns, written)
        rows = (*self._rows[:turns], *([last] if last else []))
        return Loop(
            body,
            tuple(Start(carried, values) for carried, values in starts.items()),
            len(rows),
            written,
            line_of(self._rows[0][0].meta.get("stack_trace")),
            rows,
        )

    # The part of one operand

    def _part(self, column: list[Any], starts: dict[Carried, tuple[Outside, ...]]) -> tuple[Any, int, str]:
        """The part that a leaf plays in every turn, for how many turns, and what ends it there."""
        third = column[2]
        if not isinstance(third, Read):
            return number_or_series(column)
        place = self._place.get(third.base)
        if place is None:
            return self._outside(column)
        distance = 2 - place[0]

        def holds(turn: int) -> bool:
            leaf = column[turn]
            wanted = self._place.get(leaf.base) == (turn - distance, place[1]) and leaf.path == third.path
            return turn < distance or wanted

        turns = holds_for(column, holds)
        reason = self._strange_reading(turns, column[turns]) if turns < len(column) else ""
        if distance == 0:
            return Local(place[1], third.path), turns, reason
        carried = Carried(place[1], third.path, distance)
        early = column[:distance]
        if any(leaf.fact != third.fact for leaf in early):
            self._misfits.add(carried)
        if any(leaf.base in self._place for leaf in early):
            return None, 0, reason or "its first step reads another value of the loop than the next"
        values = tuple(Outside(self._base(leaf.base), leaf.path) for leaf in early)
        if starts.setdefault(carried, values) != values:
            return None, 0, "one value of the loop starts from two values"
        return carried, turns, reason

    def _strange_reading(self, turn: int, leaf: Read) -> str:
        place = self._place.get(leaf.base)
        if place is None:
            return f"step {turn} reads a value from outside where the step before reads one of the loop"
        if place[0] == turn:
            return f"step {turn} reads another value of its own than the step before"
        return f"step {turn} reads step {place[0]}'s value"

    def _base(self, node: fx.Node) -> fx.Node | Made:
        return self._locate(node) or node

    def _outside(self, column: list[Read]) -> tuple[Any, int, str]:
        first = column[0]
        bases = [self._base(leaf.base) for leaf in column]
        turns = holds_for(bases, lambda turn: _same_place(bases[0], bases[turn]))
        base = bases[0]
        if isinstance(base, Made):
            number, turns_here, _ = number_of([made.turn for made in bases[:turns] if isinstance(made, Made)])
            base, turns = replace(base, turn=number), min(turns, turns_here)
        turns = min(turns, holds_for(column, lambda turn: _kinds(column[turn]) == _kinds(first)))
        if isinstance(base, Made):
            base, rest = split_part(base, first.path)
            column = [replace(leaf, path=leaf.path[len(first.path) - len(rest) :]) for leaf in column]
            first = column[0]
        path = []
        for depth, view in enumerate(first.path):
            numbers = []
            for place in range(len(view.numbers)):
                number, turns_here, _ = number_of(
                    [leaf.path[depth].numbers[place] for leaf in column[:turns]]
                )
                numbers.append(number)
                turns = min(turns, turns_here)
            turning = any(isinstance(number, Turning) for number in numbers)
            path.append(replace(view, numbers=tuple(numbers), written=None if turning else view.written))
        if turns == len(column):
            return Outside(base, tuple(path)), turns, ""
        if column[turns].base in self._place:
            return None, turns, self._strange_reading(turns, column[turns])
        return Outside(base, tuple(path)), turns, f"step {turns} reads another value than the step before"

    # The last turn, of which only the part is left that somebody uses

    def _unfinished_turn(
        self,
        body: tuple[Step, ...],
        starts: dict[Carried, tuple[Outside, ...]],
        turns: int,
        written: dict[int, Written],
    ) -> tuple[fx.Node | None, ...] | None:
        following = iter(self._nodes[self._start + turns * self._period :][: self._period])
        row: list[fx.Node | None] = []
        node = next(following, None)
        for position, step in enumerate(body):
            if node is not None and self._continues(node, step, body, row, turns):
                row.append(node)
                node = next(following, None)
            elif position in written or not _in_range(step, turns):
                return None
            else:
                row.append(None)
        return tuple(row) if any(row) else None

    def _continues(
        self, node: fx.Node, step: Step, body: tuple[Step, ...], row: list[fx.Node | None], turn: int
    ) -> bool:
        """Whether a node is this step of the turn after the last full one."""
        if node.target is not step.target:
            return False
        leaves, parts = _leaves(node), atoms_of(step)
        return len(leaves) == len(parts) and all(
            self._continued(leaf, part, row, turn) for leaf, part in zip(leaves, parts, strict=True)
        )

    def _continued(self, leaf: Any, part: Any, row: list[fx.Node | None], turn: int) -> bool:
        if isinstance(part, Turning):
            return bool(leaf == part.first + part.step * turn)
        if isinstance(part, Series):
            return is_number(leaf) and fits(part.law, [Point(turn, 0, leaf)], max(map(abs, part.values)))
        if not isinstance(leaf, Read):
            return type(leaf) is type(part) and bool(leaf == part)
        if isinstance(part, Local):
            return row[part.position] is leaf.base and leaf.path == part.path
        if isinstance(part, Carried):
            source = self._rows[turn - part.distance][part.position]
            return source is leaf.base and leaf.path == part.path
        if isinstance(part, Outside):
            return at_turn(part, turn) == Outside(self._base(leaf.base), leaf.path)
        return False


def _leaves(node: fx.Node) -> list[Any]:
    """What a node reads; kept with the node, as every place of a run is tried as the start of a loop."""
    if _LEAVES not in node.meta:
        node.meta[_LEAVES] = atoms((node.args, node.kwargs))
    leaves: list[Any] = node.meta[_LEAVES]
    return leaves


def atoms_of(step: Step) -> list[Any]:
    """The operands, numbers and constants of a step in a fixed order."""
    return atoms((step.args, step.kwargs))


def _step(node: fx.Node, parts: Iterator[Any]) -> Step:
    args, kwargs = filled((node.args, node.kwargs), parts)
    return Step(node.target, args, kwargs)


def _cut(part: Any, turns: int) -> Any:
    return replace(part, values=part.values[:turns]) if isinstance(part, Series) else part


def _kinds(read: Read) -> tuple[Any, ...]:
    return tuple((view.kind, view.size, len(view.numbers)) for view in read.path)


def _same_place(left: Any, right: Any) -> bool:
    if isinstance(left, Made):
        return isinstance(right, Made) and (left.loop, left.position) == (right.loop, right.position)
    return left is right


def at_turn(part: Outside, turn: int) -> Outside:
    """The place outside that an operand reads in one turn."""

    def number(value: Any) -> Any:
        return value.first + value.step * turn if isinstance(value, Turning) else value

    base = replace(part.base, turn=number(part.base.turn)) if isinstance(part.base, Made) else part.base
    path = tuple(replace(view, numbers=tuple(number(value) for value in view.numbers)) for view in part.path)
    return Outside(base, path)


def _in_range(step: Step, turn: int) -> bool:
    """Whether everything that a step would read at this turn exists."""
    for part in atoms_of(step):
        if isinstance(part, Outside):
            if isinstance(part.base, Made) and isinstance(part.base.turn, Turning):
                return False
            if not all(_view_in_range(view) for view in at_turn(part, turn).path):
                return False
    return True


def _view_in_range(view: View) -> bool:
    if view.size is None or view.kind == PART:
        return True
    bounds = view.numbers[1:3] if view.kind == SLICE else view.numbers[1:2]
    limit = view.size + 1 if view.kind == SLICE else view.size
    return all(not is_integer(bound) or 0 <= bound < limit for bound in bounds)


def _writes(body: tuple[Step, ...], position: int) -> str | None:
    """Whether a step only writes the turn's value into a buffer that nothing in the loop reads."""
    step = body[position]
    if step.target not in _WRITING:
        return None
    own = Carried(position, (), 1)
    readers = [
        (at, part)
        for at, other in enumerate(body)
        for part in atoms_of(other)
        if isinstance(part, (Local, Carried)) and part.position == position
    ]
    if readers != [(position, own)]:
        return None
    if step.target is aten.select_scatter.default and isinstance(step.args[3], Turning):
        return WRITE if step.args[0] == own else None
    if step.target is aten.slice_scatter.default and step.args[0] == own and len(step.args) >= 5:
        return WRITE if all(isinstance(number, Turning) for number in step.args[3:5]) else None
    if step.target is aten.cat.default and len(step.args[0]) == 2 and step.args[0][0] == own:
        return APPEND
    return None


def _buffer_size(node: fx.Node, kind: str) -> int | None:
    """The size that a buffer has before its first write, along the axis that is written."""
    source = node.args[0] if kind == WRITE else node.args[0][0]  # type: ignore[index]
    axis = node.args[2] if kind == WRITE else node.args[1] if len(node.args) > 1 else 0
    return known(source.meta["val"].shape[axis])  # type: ignore[union-attr]
