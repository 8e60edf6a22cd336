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
    """A number that changes from iteration to iteration as no `InductionVariable` does: `t / L`, `0.9 ** t`.

    Attributes:
        values: Of each iteration.
        closed_form: That gives them at the length of this trace alone.
    """

    values: tuple[float, ...]
    closed_form: ClosedForm = field(compare=False)


@dataclass(frozen=True)
class Local:
    """A value of the same iteration: the step at `position`, behind a path."""

    position: int
    path: tuple[View, ...] = ()


@dataclass(frozen=True)
class Carried:
    """A value of an earlier iteration, `distance` iterations before."""

    position: int
    path: tuple[View, ...]
    distance: int


@dataclass(frozen=True)
class Made:
    """The value that the step at `position` of a loop has in its iteration `iteration`; a part of it, if that is a
    tuple.
    """

    loop: int
    position: int
    iteration: Any
    part: tuple[View, ...] = ()


def split_part(made: Made, path: tuple[View, ...]) -> tuple[Made, tuple[View, ...]]:
    """Move the first step of a path into what a loop made, where it takes a part of a tuple."""
    if path and path[0].kind == PART:
        return replace(made, part=path[:1]), path[1:]
    return made, path


@dataclass(frozen=True)
class Outside:
    """A value from outside the loop, the same in each iteration but for the numbers of its path.

    Attributes:
        base: A node, or what an earlier loop made.
    """

    base: fx.Node | Made
    path: tuple[View, ...] = ()


@dataclass(frozen=True)
class Start:
    """The value that a carried value has before the first iteration; one for each iteration of distance, the first
    first.
    """

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
    """A step that computes nothing, but writes into a carried buffer (`y[:, t] = v`) or appends to it.

    Attributes:
        size: Of the buffer before the loop, along the axis that is written; None if symbolic.
    """

    kind: str
    size: Any


@dataclass(frozen=True)
class Loop:
    """A loop.

    Attributes:
        body: The operators of an iteration, in order.
        starts: The carried values with what they start from.
        iterations: How many.
        written: Positions that write into a carried buffer, or append to it.
        line: `file:line` of the first operator.
        nodes: The traced nodes, a row per iteration; None where the last iteration's value is used by nobody.
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
