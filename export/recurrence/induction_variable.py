"""`number_or_series`: how a number changes over the iterations of a loop: not at all, evenly, or by a closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe_export.export.recurrence.closed_form_fit import closed_form_of_iterations
from moe_export.export.recurrence.loop import InductionVariable, Series


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def holds_for(column: Sequence[Any], holds: Callable[[int], bool]) -> int:
    """For how many iterations, from the first on, something holds."""
    return next((iteration for iteration in range(len(column)) if not holds(iteration)), len(column))


def number_of(column: Sequence[Any]) -> tuple[Any, int, str]:
    """A constant or an `InductionVariable`, for how many iterations it holds, and what ends it there."""
    first = column[0]
    if len(column) > 1 and is_integer(first) and is_integer(column[1]) and first != column[1]:
        step = column[1] - first
        iterations = holds_for(
            column,
            lambda iteration: is_integer(column[iteration]) and column[iteration] == first + step * iteration,
        )
        return (
            InductionVariable(first, step),
            iterations,
            "a number in it does not change by the same amount in every iteration",
        )
    iterations = holds_for(
        column, lambda iteration: type(column[iteration]) is type(first) and column[iteration] == first
    )
    return first, iterations, f"step {iterations} has a different constant than the step before"


def number_or_series(column: Sequence[Any]) -> tuple[Any, int, str]:
    """A constant, an `InductionVariable` or a `Series`, for how many iterations it holds, and what ends it there."""
    part, iterations, reason = number_of(column)
    if iterations == len(column) or not all(is_number(value) for value in column):
        return part, iterations, reason
    closed_form, iterations_of_form = closed_form_of_iterations(tuple(column))
    before, after = column[iterations - 1 : iterations + 1]
    reason = (
        f"step {iterations - 1} computes with {before!r}, step {iterations} with {after!r}, "
        "and no formula is known for it"
    )
    if closed_form is None or iterations_of_form <= iterations:
        return part, iterations, reason
    return Series(tuple(column[:iterations_of_form]), closed_form), iterations_of_form, reason
