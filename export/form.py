"""`Form`: an integer of a traced graph as a function of the length L, found from its values at several lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LARGEST_DIVISOR = 8


@dataclass(frozen=True)
class Form:
    """`(slope * L + offset) // divisor`.

    Example:
        >>> form_of({8: 7, 9: 8, 11: 10})
        Form(slope=1, offset=-1, divisor=1)
        >>> print(form_of({8: 4, 9: 5, 11: 6}))  # the turns of range(0, L, 2)
        (L + 1) // 2
    """

    slope: int
    offset: int
    divisor: int = 1

    def at(self, length: Any) -> Any:
        """The value at a length; a number or a symbolic integer."""
        scaled = length if self.slope == 1 else length * self.slope
        moved = scaled if self.offset == 0 else scaled + self.offset
        return moved if self.divisor == 1 else moved // self.divisor

    def __str__(self) -> str:
        scaled = {1: "L", -1: "-L"}.get(self.slope, f"{self.slope} * L")
        moved = scaled + (f" {'-' if self.offset < 0 else '+'} {abs(self.offset)}" if self.offset else "")
        return moved if self.divisor == 1 else f"({moved}) // {self.divisor}"


def form_of(values: Mapping[int, int]) -> Form | None:
    """The simplest form that takes these values at these lengths; None if there is none.

    Args:
        values: Length → value; at least three, so that the form is confirmed, not only drawn.
    """
    for divisor in range(1, _LARGEST_DIVISOR + 1):
        for slope in range(-_LARGEST_DIVISOR, _LARGEST_DIVISOR + 1):
            # value <= (slope * L + offset) / divisor < value + 1 bounds the offset at each length.
            low = max(value * divisor - slope * length for length, value in values.items())
            high = min((value + 1) * divisor - 1 - slope * length for length, value in values.items())
            if low <= high and slope:
                return Form(slope, low, divisor)
    return None
