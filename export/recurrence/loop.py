"""`Loop`: a Python loop as it was found in a traced graph, as plain data.

h = h0                                     iteration t
for t in range(T):          Step  mul      a[:, t] (Outside, sliced), Carried(add)
    h = a[:, t] * h + b[:, t]     add      Local(mul), b[:, t]
    ys.append(h)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from moe_export.export.recurrence.closed_form import ClosedForm
from moe_export.export.recurrence.operand import PART, View

WRITE, APPEND = "write", "append"


@dataclass(frozen=True)
class InductionVariable:
    """An integer that counts with the iterations: `first + iteration * step`."""

    first: Any
    step: Any


@dataclass(frozen=True)
class Series:
    """A number that changes from iteration to iteration, but not evenly: `t / L`, `0.9 ** t`.

    Attributes:
        values: The value in each iteration.
        closed_form: One that gives them at the length of this trace; at others it may not.
    """

    values: tuple[float, ...]
    closed_form: ClosedForm = field(compare=False)


@dataclass(frozen=True)
class Local:
    """A value of the same iteration: `path` applied to the result of the step at `position`."""

    position: int
    path: tuple[View, ...] = ()


@dataclass(frozen=True)
class Carried:
    """A value of the iteration `distance` iterations ago: `path` applied to the result of the step at `position`."""

    position: int
    path: tuple[View, ...]
    distance: int


@dataclass(frozen=True)
class Made:
    """What the step at `position` of loop `loop` gives in iteration `iteration`; one `part` of it, if it is a tuple."""

    loop: int
    position: int
    iteration: Any
    part: tuple[View, ...] = ()


def split_part(made: Made, path: tuple[View, ...]) -> tuple[Made, tuple[View, ...]]:
    """Move the first view of a path into `made` if it takes a part of a tuple; the result and the rest of the path."""
    if path and path[0].kind == PART:
        return replace(made, part=path[:1]), path[1:]
    return made, path


@dataclass(frozen=True)
class Outside:
    """A value from outside the loop, the same in each iteration except for the numbers in its path.

    Attributes:
        base: A node, or what an earlier loop made.
    """

    base: fx.Node | Made
    path: tuple[View, ...] = ()


@dataclass(frozen=True)
class Start:
    """What a carried value is before the first iteration: `distance` values, oldest first."""

    carried: Carried
    values: tuple[Outside, ...]


@dataclass(frozen=True)
class Step:
    """One operator of the body; the leaves of its arguments are operands, numbers and constants."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Written:
    """A step that only writes into a carried buffer (`y[:, t] = v`) or appends to it.

    Attributes:
        kind: `WRITE` or `APPEND`.
        size: The buffer's size before the loop, along the written axis; None if symbolic.
    """

    kind: str
    size: Any


@dataclass(frozen=True)
class Loop:
    """A loop.

    Attributes:
        body: The operators of an iteration, in order.
        starts: The carried values with what they start from.
        iterations: How many iterations it has.
        written: The positions of steps that only write into a carried buffer, or append to it.
        line: `file:line` of the first operator.
        nodes: The traced nodes, a row per iteration; None where nothing uses the last iteration's value.
    """

    body: tuple[Step, ...]
    starts: tuple[Start, ...]
    iterations: int
    written: dict[int, Written]
    line: str | None = field(compare=False)
    nodes: tuple[tuple[fx.Node | None, ...], ...] = field(compare=False, repr=False)

    @property
    def first(self) -> fx.Node:
        """The first operator of the first iteration."""
        node = self.nodes[0][0]
        assert node is not None
        return node

    def __str__(self) -> str:
        names = " ".join(str(getattr(step.target, "__name__", step.target)) for step in self.body)
        return f"{self.iterations} iterations of {len(self.body)} operators ({names}) at {self.line or '?'}"
