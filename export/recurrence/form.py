"""`Form`: an integer of a traced graph as a function of the length L, found from its values at several lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

_LARGEST_DIVISOR = 8


class FormError(ValueError):
    """A sum of two integers is no form, though each of them is."""


@dataclass(frozen=True)
class Form:
    """`factor * ((slope * L + offset) // divisor) + shift`; of several lengths, L is number `of`.

    Example:
        >>> form_of({8: 7, 9: 8, 11: 10})
        Form(slope=1, offset=-1, divisor=1, factor=1, shift=0)
        >>> print(form_of({8: 4, 9: 5, 11: 6}))  # the turns of range(0, L, 2)
        (L + 1) // 2
    """

    slope: int
    offset: int
    divisor: int = 1
    factor: int = 1
    shift: int = 0
    of: int = 0

    def at(self, length: int) -> int:
        """The value at a length."""
        return self.factor * ((self.slope * length + self.offset) // self.divisor) + self.shift

    def __str__(self) -> str:
        scaled = {1: "L", -1: "-L"}.get(self.slope, f"{self.slope} * L")
        moved = scaled + (f" {'-' if self.offset < 0 else '+'} {abs(self.offset)}" if self.offset else "")
        if self.divisor == 1:
            return moved
        rounded = f"({moved}) // {self.divisor}" if self.offset else f"{moved} // {self.divisor}"
        scaled = rounded if self.factor == 1 else f"{self.factor} * ({rounded})"
        return scaled + (f" {'-' if self.shift < 0 else '+'} {abs(self.shift)}" if self.shift else "")


def form_of(values: Mapping[int, int]) -> Form | None:
    """The simplest form that takes these values at these lengths; None if there is none.

    Args:
        values: Length → value; at least three, so that the form is confirmed, not only drawn.
    """
    return _line(values) or _rounded(values)


def form_of_one(sizes: Sequence[tuple[int, ...]], values: Sequence[int]) -> Form | None:
    """The simplest form of one of several lengths, from values at three or more sizes of them."""
    columns = [dict(zip(column, values, strict=True)) for column in zip(*sizes, strict=True)]
    for form_in in (_line, _rounded):
        for number, column in enumerate(columns):
            form = form_in(column)
            if form is not None:
                return replace(form, of=number)
    return None


def _line(values: Mapping[int, int]) -> Form | None:
    (first, value), (last, other) = min(values.items()), max(values.items())
    slope, rest = divmod(other - value, last - first)
    line = Form(slope, value - slope * first)
    fits = slope and not rest and all(line.at(length) == each for length, each in values.items())
    return line if fits else None


def _rounded(values: Mapping[int, int]) -> Form | None:
    for divisor in range(1, _LARGEST_DIVISOR + 1):
        for slope in range(-_LARGEST_DIVISOR, _LARGEST_DIVISOR + 1):
            # value <= (slope * L + offset) / divisor < value + 1 bounds the offset at each length.
            low = max(value * divisor - slope * length for length, value in values.items())
            high = min((value + 1) * divisor - 1 - slope * length for length, value in values.items())
            if low <= high and slope:
                return Form(slope, low, divisor)
    return None


def moved(number: Any, by: Any) -> Any:
    """The sum of two numbers, either of which may be a form.

    Raises:
        FormError: They are rounded differently, or of different lengths, so that their sum is no form.
    """
    if isinstance(by, Form) and not isinstance(number, Form):
        number, by = by, number
    if not isinstance(number, Form):
        return number + by
    if not isinstance(by, Form):
        if number.divisor != 1:
            return replace(number, shift=number.shift + by)
        return replace(number, offset=number.offset + by)
    if number.of != by.of:
        raise FormError(f"{number} and {by} are of different lengths")
    if number.divisor == by.divisor == 1:
        slope, offset = number.slope + by.slope, number.offset + by.offset
        return replace(number, slope=slope, offset=offset) if slope else offset
    if (number.slope, number.offset, number.divisor) != (by.slope, by.offset, by.divisor):
        raise FormError(f"{number} and {by} are rounded differently")
    factor, shift = number.factor + by.factor, number.shift + by.shift
    return replace(number, factor=factor, shift=shift) if factor else shift


def scaled(number: Any, by: int) -> Any:
    """A number, which may be a form, times an integer."""
    if not isinstance(number, Form):
        return number * by
    if by == 0:
        return 0
    if number.divisor == 1:
        return replace(number, slope=number.slope * by, offset=number.offset * by)
    return replace(number, factor=number.factor * by, shift=number.shift * by)
