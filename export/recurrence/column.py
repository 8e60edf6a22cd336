"""`number_or_series`: the part that a number plays in the turns of a loop: constant, counting, or following a law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe_export.export.recurrence.law_fit import law_of_turns
from moe_export.export.recurrence.loop import Series, Turning


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def holds_for(column: Sequence[Any], holds: Callable[[int], bool]) -> int:
    """For how many turns from the first something holds."""
    return next((turn for turn in range(len(column)) if not holds(turn)), len(column))


def number_of(column: Sequence[Any]) -> tuple[Any, int, str]:
    """A constant, or an integer that moves by one step; and for how many turns it does."""
    first = column[0]
    if len(column) > 1 and is_integer(first) and is_integer(column[1]) and first != column[1]:
        step = column[1] - first
        turns = holds_for(
            column, lambda turn: is_integer(column[turn]) and column[turn] == first + step * turn
        )
        return Turning(first, step), turns, "a number in it does not change evenly from turn to turn"
    turns = holds_for(column, lambda turn: type(column[turn]) is type(first) and column[turn] == first)
    return first, turns, f"step {turns} has another constant than the step before"


def number_or_series(column: Sequence[Any]) -> tuple[Any, int, str]:
    """A number of a step: constant, counting, or by a law; and for how many turns it is."""
    part, turns, reason = number_of(column)
    if turns == len(column) or not all(is_number(value) for value in column):
        return part, turns, reason
    law, turns_of_law = law_of_turns(tuple(column))
    before, after = column[turns - 1 : turns + 1]
    reason = f"step {turns - 1} computes with {before!r}, step {turns} with {after!r}, and no formula is known for it"
    if law is None or turns_of_law <= turns:
        return part, turns, reason
    return Series(tuple(column[:turns_of_law]), law), turns_of_law, reason
