"""`Form`: an integer of a traced graph as a function of the length L, found from its values at several lengths."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

_LARGEST_DIVISOR = 8  # of the stride of a loop, `range(0, L, 8)`
_LARGEST_CHUNK = 64
_LEAST_FOR_CHUNKS = 4
"""Values: two determine the form for each chunk size, and a third would fit one of the many chunk sizes by chance."""


class FormError(ValueError):
    """The sum of two forms is not a form."""


@dataclass(frozen=True)
class Form:
    """`factor * ((slope * L + offset) // divisor) + plus * L + shift`; if there are several lengths, L is number `of`.

    After the last length comes the product of all.

    Example:
        >>> form_of({8: 7, 9: 8, 11: 10})
        Form(slope=1, offset=-1, divisor=1, factor=1, shift=0, plus=0, of=0)
        >>> print(form_of({8: 4, 9: 5, 11: 6}))  # the iterations of range(0, L, 2)
        (L + 1) // 2
        >>> print(form_of({13: 3, 18: 2, 24: 0, 31: 1}))  # the padding to a multiple of 4
        4 * ((L + 3) // 4) - L
    """

    slope: int
    offset: int
    divisor: int = 1
    factor: int = 1
    shift: int = 0
    plus: int = 0
    of: int = 0

    def at(self, length: int) -> int:
        """The value at a length."""
        rounded = (self.slope * length + self.offset) // self.divisor
        return self.factor * rounded + self.plus * length + self.shift

    def __str__(self) -> str:
        scaled = {1: "L", -1: "-L"}.get(self.slope, f"{self.slope} * L")
        moved = scaled + (f" {'-' if self.offset < 0 else '+'} {abs(self.offset)}" if self.offset else "")
        if self.divisor == 1:
            return moved
        rounded = f"({moved}) // {self.divisor}" if self.offset else f"{moved} // {self.divisor}"
        scaled = rounded if self.factor == 1 else f"{self.factor} * ({rounded})"
        if self.plus:
            times = "L" if abs(self.plus) == 1 else f"{abs(self.plus)} * L"
            scaled += f" {'-' if self.plus < 0 else '+'} {times}"
        return scaled + (f" {'-' if self.shift < 0 else '+'} {abs(self.shift)}" if self.shift else "")


@dataclass(frozen=True)
class TracedLengths:
    """The lengths at which a model was traced.

    Attributes:
        sizes: For each trace, the size of every length; of several, then their product.
        chunk: The places that an iteration takes, where that is known.
    """

    sizes: tuple[tuple[int, ...], ...]
    chunk: int | None = None


def form_of(values: Mapping[int, int], chunk: int | None = None) -> Form | None:
    """The simplest form that takes these values at these lengths; None if there is none.

    Args:
        values: Length → value, for at least three lengths: two determine a form, the others confirm it.
        chunk: What it is rounded to, if that is known: few values fit several chunk sizes.
    """
    return _line(values) or _rounded(values, chunk)


def form_of_one(lengths: TracedLengths, values: Sequence[int]) -> Form | None:
    """The simplest form, of one of several lengths, that takes these values; None if there is none.

    Args:
        lengths: At least three.
        values: For each of them.
    """
    columns = [dict(zip(column, values, strict=True)) for column in zip(*lengths.sizes, strict=True)]
    for form_in in (_line, lambda column: _rounded(column, lengths.chunk)):
        for number, column in enumerate(columns):
            form = form_in(column)
            if form is not None:
                return replace(form, of=number)
    return None


def _of_chunks(values: Mapping[int, int], form: Form) -> Form | None:
    """A form with the factor and shift that give these values: of full chunks, or of chunks begun; else None."""
    rounded = {length: (form.slope * length + form.offset) // form.divisor for length in values}
    rest = {length: value - form.plus * length for length, value in values.items()}
    first, last = min(values), max(values)
    iterations = rounded[last] - rounded[first]
    factor, uneven = divmod(rest[last] - rest[first], iterations) if iterations else (0, 0)
    found = replace(form, factor=factor, shift=rest[first] - factor * rounded[first])
    if not factor or uneven or any(found.at(length) != value for length, value in values.items()):
        return None
    return found


def _line(values: Mapping[int, int]) -> Form | None:
    (first, value), (last, other) = min(values.items()), max(values.items())
    slope, rest = divmod(other - value, last - first)
    line = Form(slope, value - slope * first)
    fits = slope and not rest and all(line.at(length) == each for length, each in values.items())
    return line if fits else None


def _rounded(values: Mapping[int, int], chunk: int | None) -> Form | None:
    if len(values) >= _LEAST_FOR_CHUNKS:
        rounded = (
            _of_chunks(values, Form(1, offset, divisor, plus=plus))
            for divisor in range(2, _LARGEST_CHUNK + 1)
            for offset, plus in itertools.product((divisor - 1, 0), (0, -1, 1))
        )
        found = [form for form in rounded if form is not None]
        if found:
            # Where no length is a multiple of the chunk, chunks begun are meant: a model pads to whole chunks.
            return min(
                found, key=lambda f: (f.divisor != chunk, f.divisor == chunk and not f.offset, _parts(f))
            )
    for divisor in range(1, _LARGEST_DIVISOR + 1):
        for slope in range(-_LARGEST_DIVISOR, _LARGEST_DIVISOR + 1):
            # value <= (slope * L + offset) / divisor < value + 1 bounds the offset at each length.
            low = max(value * divisor - slope * length for length, value in values.items())
            high = min((value + 1) * divisor - 1 - slope * length for length, value in values.items())
            if low <= high and slope:
                return Form(slope, low, divisor)
    return None


def _parts(form: Form) -> int:
    """How much there is to a form beside its rounding: what fits a few values by chance has more."""
    return (form.plus != 0) + (form.factor not in (1, form.divisor, -form.divisor)) + (form.shift != 0)


def moved(number: Any, by: Any) -> Any:
    """The sum of two numbers, either of which may be a form.

    Raises:
        FormError: They are rounded differently, or are of different lengths, so that their sum is not a form.
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
    if by.divisor != 1 and number.divisor == 1:
        number, by = by, number
    if by.divisor == 1:
        return replace(number, plus=number.plus + by.slope, shift=number.shift + by.offset)
    if (number.slope, number.offset, number.divisor) != (by.slope, by.offset, by.divisor):
        raise FormError(f"{number} and {by} are rounded differently")
    factor, shift, plus = number.factor + by.factor, number.shift + by.shift, number.plus + by.plus
    if factor:
        return replace(number, factor=factor, shift=shift, plus=plus)
    return Form(plus, shift, of=number.of) if plus else shift


def scaled(number: Any, by: int) -> Any:
    """A number, which may be a form, times an integer."""
    if not isinstance(number, Form):
        return number * by
    if by == 0:
        return 0
    if number.divisor == 1:
        return replace(number, slope=number.slope * by, offset=number.offset * by)
    return replace(number, factor=number.factor * by, shift=number.shift * by, plus=number.plus * by)
