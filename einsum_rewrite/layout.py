"""How the labels of an equation lie on the axes of a tensor, and the cheapest way from one layout to another.

A layout is a tuple of axes; an axis is the tuple of the labels folded into it:

    (("b",), (), ("h", "d"))      shape (b, 1, h*d)

`arrange` needs at most one reshape, one permute and one more reshape; mostly it needs one step or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

Axis = tuple[str, ...]
Layout = tuple[Axis, ...]

UNIT: Axis = ()
"""An axis of size 1 that belongs to no label."""


@dataclass(frozen=True)
class Permute:
    """Reorder the axes: axis `i` of the result is axis `order[i]` of the operand."""

    order: tuple[int, ...]


@dataclass(frozen=True)
class Unsqueeze:
    """Insert axes of size 1; `axes` are positions in the result, ascending."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Squeeze:
    """Remove axes of size 1; `axes` are positions in the operand, ascending."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Reshape:
    """Fold neighbouring axes into one, unfold them, or both; the order of the labels stays."""


Move = Permute | Unsqueeze | Squeeze | Reshape
"""A step that changes where the labels lie and computes nothing."""


def flat(layout: Iterable[Axis]) -> Axis:
    """The labels of a layout from left to right."""
    return tuple(label for axis in layout for label in axis)


def plain(labels: Iterable[str]) -> Layout:
    """The layout with one axis a label."""
    return tuple((label,) for label in labels)


@lru_cache(maxsize=65536)
def arrange(start: Layout, goal: Layout) -> tuple[tuple[Move, Layout], ...]:
    """The moves from `start` to `goal`, each with the layout that it leads to.

    Both hold the same labels; axes of size 1 may come and go.
    """
    if start == goal:
        return ()
    if flat(start) == flat(goal):
        return ((_regroup(start, goal), goal),)
    moves: list[tuple[Move, Layout]] = []
    if any(len(axis) > 1 for axis in start):
        start = plain(flat(start))
        moves.append((Reshape(), start))
    order = _order(start, goal)
    permuted = tuple(start[i] for i in order)
    moves.append((Permute(order), permuted))
    if permuted != goal:
        moves.append((_regroup(permuted, goal), goal))
    return tuple(moves)


def show_layout(layout: Layout) -> str:
    """A layout as a person writes a shape: `b 1 (h d)`; `scalar` where there is no axis."""
    return " ".join(_show_axis(axis) for axis in layout) or "scalar"


def _show_axis(axis: Axis) -> str:
    if not axis:
        return "1"
    return axis[0] if len(axis) == 1 else f"({' '.join(axis)})"


def _order(start: Layout, goal: Layout) -> tuple[int, ...]:
    """Put the labels of `start` in the order of `goal`, and axes of size 1 where `goal` wants them."""
    place = {axis[0]: i for i, axis in enumerate(start) if axis}
    spare = [i for i, axis in enumerate(start) if not axis]
    order: list[int] = []
    for axis in goal:
        if axis:
            order += [place[label] for label in axis]
        elif spare:
            order.append(spare.pop(0))
    return tuple(order + spare)


def _regroup(start: Layout, goal: Layout) -> Move:
    """The one move between two layouts whose labels have the same order."""
    added = _units_beyond(goal, start)
    if added is not None:
        return Unsqueeze(added)
    removed = _units_beyond(start, goal)
    return Reshape() if removed is None else Squeeze(removed)


def _units_beyond(longer: Sequence[Axis], shorter: Sequence[Axis]) -> tuple[int, ...] | None:
    """Where `longer` has axes of size 1 that `shorter` lacks; None if that is not the only difference."""
    extra, k = [], 0
    for i, axis in enumerate(longer):
        if k < len(shorter) and shorter[k] == axis:
            k += 1
        elif axis == UNIT:
            extra.append(i)
        else:
            return None
    return tuple(extra) if k == len(shorter) else None
