"""`match_iterations`: from a place where a traced graph repeats itself, the longest loop that its data flow allows.

In every iteration, an operand must play the same part: a value of the same iteration, of an earlier one, of the same
place outside, or of a place outside whose index moves by a constant step. Where that ends, the loop ends; if that is
before the third iteration, there is no loop, and the reason is reported to the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moe_export.export.frontend.source import line_of
from moe_export.export.recurrence.closed_form_fit import Point, fits
from moe_export.export.recurrence.induction_sequences import counts, why_not
from moe_export.export.recurrence.induction_variable import (
    holds_for,
    is_integer,
    is_number,
    number_of,
    number_or_series,
)
from moe_export.export.recurrence.loop import (
    APPEND,
    WRITE,
    Carried,
    InductionVariable,
    Local,
    Loop,
    Made,
    Outside,
    Series,
    Start,
    Step,
    Written,
    split_part,
)
from moe_export.export.recurrence.operand import PART, SLICE, Read, View, atoms, filled
from moe_export.export.recurrence.period import LEAST_ITERATIONS
from moe_export.export.sizes import fixed

aten = torch.ops.aten

_LEAVES = "leaves"
_WRITING = (aten.select_scatter.default, aten.slice_scatter.default, aten.cat.default)
Locate = Callable[[fx.Node], Made | None]


@dataclass(frozen=True)
class Refusal:
    """Why nodes that repeat are not a loop.

    Attributes:
        reason: For the user, in terms of steps.
        node: The node at which it shows.
        iterations: For how many iterations the nodes could be a loop.
        nodes: How many nodes repeat there.
        of_number: Whether the reason is a number that the steps compute with.
    """

    reason: str
    node: fx.Node
    iterations: int
    nodes: int = 0
    of_number: bool = False


def match_iterations(
    nodes: Sequence[fx.Node], start: int, period: int, stop: int, locate: Locate
) -> Loop | Refusal:
    """The longest loop whose first iteration is `nodes[start : start + period]`.

    Args:
        nodes: Computations in trace order.
        start: Where the first iteration begins.
        period: Its number of nodes.
        stop: Where the nodes cease to repeat.
        locate: Gives the place of a node in an earlier loop; None if it is in none.
    """
    return _Matching(nodes, start, period, (stop - start) // period, locate).loop()


class _Matching:
    def __init__(self, nodes: Sequence[fx.Node], start: int, period: int, most: int, locate: Locate) -> None:
        self._nodes, self._start, self._period, self._locate = nodes, start, period, locate
        self._rows = [
            tuple(nodes[start + iteration * period : start + (iteration + 1) * period])
            for iteration in range(most)
        ]
        self._misfits: set[Carried] = set()
        self._place = {
            node: (iteration, position)
            for iteration, row in enumerate(self._rows)
            for position, node in enumerate(row)
        }

    def loop(self) -> Loop | Refusal:
        iterations = len(self._rows)
        if iterations < LEAST_ITERATIONS:
            return Refusal("it has fewer than three iterations", self._nodes[self._start], iterations)
        parts: list[list[Any]] = []
        starts: dict[Carried, tuple[Outside, ...]] = {}
        for position in range(self._period):
            rows = [_leaves(row[position]) for row in self._rows]
            found = []
            for column in zip(*rows, strict=True):
                part, iterations_here, reason = self._part(list(column), starts)
                if iterations_here < LEAST_ITERATIONS:
                    node = self._rows[max(iterations_here, 0)][position]
                    return Refusal(reason, node, iterations_here, of_number=not isinstance(column[2], Read))
                iterations = min(iterations, iterations_here)
                found.append(part)
            parts.append(found)
        body = tuple(
            _step(node, iter([_cut(part, iterations) for part in found]))
            for node, found in zip(self._rows[0], parts, strict=True)
        )
        return self._finished(body, starts, iterations)

    def _finished(
        self, body: tuple[Step, ...], starts: dict[Carried, tuple[Outside, ...]], iterations: int
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
                    return Refusal(reason, self._rows[1][position], iterations)
        for carried in self._misfits:
            if carried.position not in written:
                return Refusal(
                    "its first iteration starts from a value of a different shape or type than the others",
                    self._rows[0][carried.position], 0,
                )  # fmt: skip
        last = self._unfinished_iteration(body, starts, iterations, written)
        rows = (*self._rows[:iterations], *([last] if last else []))
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
        """The part that an operand plays in every iteration, for how many iterations, and what ends it there."""
        third = column[2]
        if not isinstance(third, Read):
            return number_or_series(column)
        place = self._place.get(third.base)
        if place is None:
            return self._outside(column)
        distance = 2 - place[0]

        def holds(iteration: int) -> bool:
            leaf = column[iteration]
            wanted = (
                self._place.get(leaf.base) == (iteration - distance, place[1]) and leaf.path == third.path
            )
            return iteration < distance or wanted

        iterations = holds_for(column, holds)
        reason = self._strange_reading(iterations, column[iterations]) if iterations < len(column) else ""
        if distance == 0:
            return Local(place[1], third.path), iterations, reason
        carried = Carried(place[1], third.path, distance)
        early = column[:distance]
        if any(leaf.fact != third.fact for leaf in early):
            self._misfits.add(carried)
        if any(leaf.base in self._place for leaf in early):
            return None, 0, reason or "its first step reads a different value of the loop than the next"
        values = tuple(Outside(self._base(leaf.base), leaf.path) for leaf in early)
        if starts.setdefault(carried, values) != values:
            return None, 0, "one value of the loop starts from two values"
        return carried, iterations, reason

    def _strange_reading(self, iteration: int, leaf: Read) -> str:
        place = self._place.get(leaf.base)
        if place is None:
            return f"step {iteration} reads a value from outside where the step before reads one of the loop"
        if place[0] == iteration:
            return f"step {iteration} reads a different value of its own than the step before"
        return f"step {iteration} reads step {place[0]}'s value"

    def _base(self, node: fx.Node) -> fx.Node | Made:
        return self._locate(node) or node

    def _outside(self, column: list[Read]) -> tuple[Any, int, str]:
        first = column[0]
        bases = [self._base(leaf.base) for leaf in column]
        iterations = holds_for(bases, lambda iteration: _same_place(bases[0], bases[iteration]))
        base = bases[0]
        if isinstance(base, Made):
            number, iterations_here, _ = number_of(
                [made.iteration for made in bases[:iterations] if isinstance(made, Made)]
            )
            base, iterations = replace(base, iteration=number), min(iterations, iterations_here)
        iterations = min(
            iterations, holds_for(column, lambda iteration: _kinds(column[iteration]) == _kinds(first))
        )
        if isinstance(base, Made):
            base, rest = split_part(base, first.path)
            column = [replace(leaf, path=leaf.path[len(first.path) - len(rest) :]) for leaf in column]
            first = column[0]
        path = []
        for depth, view in enumerate(first.path):
            numbers = []
            for place in range(len(view.numbers)):
                number, iterations_here, _ = number_of(
                    [leaf.path[depth].numbers[place] for leaf in column[:iterations]]
                )
                numbers.append(number)
                iterations = min(iterations, iterations_here)
            variable = any(isinstance(number, InductionVariable) for number in numbers)
            path.append(replace(view, numbers=tuple(numbers), written=None if variable else view.written))
        if iterations == len(column):
            return Outside(base, tuple(path)), iterations, ""
        if column[iterations].base in self._place:
            return None, iterations, self._strange_reading(iterations, column[iterations])
        return (
            Outside(base, tuple(path)),
            iterations,
            f"step {iterations} reads a different value than the step before",
        )

    # The last iteration, of which the trace only keeps what is used

    def _unfinished_iteration(
        self,
        body: tuple[Step, ...],
        starts: dict[Carried, tuple[Outside, ...]],
        iterations: int,
        written: dict[int, Written],
    ) -> tuple[fx.Node | None, ...] | None:
        following = iter(self._nodes[self._start + iterations * self._period :][: self._period])
        row: list[fx.Node | None] = []
        node = next(following, None)
        for position, step in enumerate(body):
            if node is not None and self._continues(node, step, body, row, iterations):
                row.append(node)
                node = next(following, None)
            elif position in written or not _in_range(step, iterations):
                return None
            else:
                row.append(None)
        return tuple(row) if any(row) else None

    def _continues(
        self, node: fx.Node, step: Step, body: tuple[Step, ...], row: list[fx.Node | None], iteration: int
    ) -> bool:
        """Whether a node is this step of the iteration after the last full one."""
        if node.target is not step.target:
            return False
        leaves, parts = _leaves(node), atoms_of(step)
        return len(leaves) == len(parts) and all(
            self._continued(leaf, part, row, iteration) for leaf, part in zip(leaves, parts, strict=True)
        )

    def _continued(self, leaf: Any, part: Any, row: list[fx.Node | None], iteration: int) -> bool:
        if isinstance(part, InductionVariable):
            return bool(leaf == part.first + part.step * iteration)
        if isinstance(part, Series):
            return is_number(leaf) and fits(
                part.closed_form, [Point(iteration, 0, leaf)], max(map(abs, part.values))
            )
        if not isinstance(leaf, Read):
            return type(leaf) is type(part) and bool(leaf == part)
        if isinstance(part, Local):
            return row[part.position] is leaf.base and leaf.path == part.path
        if isinstance(part, Carried):
            source = self._rows[iteration - part.distance][part.position]
            return source is leaf.base and leaf.path == part.path
        if isinstance(part, Outside):
            return at_iteration(part, iteration) == Outside(self._base(leaf.base), leaf.path)
        return False


def _leaves(node: fx.Node) -> list[Any]:
    """What a node reads; cached in the node, as every place in a run is tried as the start of a loop."""
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


def _cut(part: Any, iterations: int) -> Any:
    return replace(part, values=part.values[:iterations]) if isinstance(part, Series) else part


def _kinds(read: Read) -> tuple[Any, ...]:
    return tuple((view.kind, view.size, len(view.numbers)) for view in read.path)


def _same_place(left: Any, right: Any) -> bool:
    if isinstance(left, Made):
        return isinstance(right, Made) and (left.loop, left.position) == (right.loop, right.position)
    return left is right


def at_iteration(part: Outside, iteration: int) -> Outside:
    """What an operand reads outside in one iteration: its induction variables replaced by numbers."""

    def number(value: Any) -> Any:
        return value.first + value.step * iteration if isinstance(value, InductionVariable) else value

    base = (
        replace(part.base, iteration=number(part.base.iteration))
        if isinstance(part.base, Made)
        else part.base
    )
    path = tuple(replace(view, numbers=tuple(number(value) for value in view.numbers)) for view in part.path)
    return Outside(base, path)


def _in_range(step: Step, iteration: int) -> bool:
    """Whether everything that a step would read in an iteration exists."""
    for part in atoms_of(step):
        if isinstance(part, Outside):
            if isinstance(part.base, Made) and isinstance(part.base.iteration, InductionVariable):
                return False
            if not all(_view_in_range(view) for view in at_iteration(part, iteration).path):
                return False
    return True


def _view_in_range(view: View) -> bool:
    if view.size is None or view.kind == PART:
        return True
    bounds = view.numbers[1:3] if view.kind == SLICE else view.numbers[1:2]
    limit = view.size + 1 if view.kind == SLICE else view.size
    return all(not is_integer(bound) or 0 <= bound < limit for bound in bounds)


def _writes(body: tuple[Step, ...], position: int) -> str | None:
    """`WRITE` or `APPEND` if a step only writes the iteration's value into a buffer that nothing in the loop reads."""
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
    if step.target is aten.select_scatter.default and isinstance(step.args[3], InductionVariable):
        return WRITE if step.args[0] == own else None
    if step.target is aten.slice_scatter.default and step.args[0] == own and len(step.args) >= 5:
        return WRITE if all(isinstance(number, InductionVariable) for number in step.args[3:5]) else None
    if step.target is aten.cat.default and len(step.args[0]) == 2 and step.args[0][0] == own:
        return APPEND
    return None


def _buffer_size(node: fx.Node, kind: str) -> int | None:
    """The size of a buffer before its first write, along the written axis; None if symbolic."""
    source = node.args[0] if kind == WRITE else node.args[0][0]  # type: ignore[index]
    axis = node.args[2] if kind == WRITE else node.args[1] if len(node.args) > 1 else 0
    return fixed(source.meta["val"].shape[axis])  # type: ignore[union-attr]
