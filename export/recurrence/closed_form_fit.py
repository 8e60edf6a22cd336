"""`closed_form_of`: the closed form of the numbers that the steps of traces at several lengths compute with.

Closed forms are proposed from a few of the values, with constants as round as possible, and judged by all values of all
lengths: each must come out to the last digits of float64. Not to the last bit: `lo + (hi - lo) * t / n` and
`lo + (hi - lo) * (t / n)` are rounded in a different order, and a trace does not say which one it was.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from moe_export.export.recurrence.closed_form import Applied, ClosedForm, Line, Power, Ratio

LEAST = 5  # iterations: a form has up to three constants, and two more values confirm them

_LAST_DIGITS = 8 * 2.0**-52
_ROUND = (1, 10, 100, 10**3, 10**4, 10**5, 10**6, 10**7)  # largest denominators of constants
_NEAR = 1e-6  # how far a proposed constant may be from what the values say; `fits` is stricter
_LARGEST = 2**40  # common denominator of the integers of a ratio
_HUGE = 1e100  # beyond any float32, while its square is still a float64
_PLAIN = 2**30  # numerator times denominator: with larger ones, some fraction comes near any number
_CANCELLED = 2.0**16
"""How much larger than the values their terms may be: beyond that, cancellation leaves too few digits to judge by."""
_OUTER = ((0.0, 1.0), (0.0, -1.0), (1.0, -1.0), (0.5, 0.5), (0.5, -0.5))
"""Shift and scale around a function: f, -f, 1 - f, (1 + f) / 2, (1 - f) / 2."""
_EXPONENTS = (2.0, -1.0, 0.5, -0.5, 3.0, -2.0, 1.5, -1.5)


_Array = np.ndarray[Any, np.dtype[np.float64]]


class Point(NamedTuple):
    """A value of one iteration at one length."""

    iteration: int
    length: int
    value: float


def closed_form_of(columns: Mapping[int, Sequence[float]]) -> ClosedForm | None:
    """The closed form that gives these values; None if none of the known forms does.

    Args:
        columns: Length → the value of each iteration, at least five of them and not all the same.
    """
    try:
        rows = [[Point(iteration, length, float(value)) for iteration, value in enumerate(column)]
                for length, column in columns.items()]  # fmt: skip
    except OverflowError:
        return None
    points = [point for row in rows for point in row]
    if not all(abs(point.value) < _HUGE for point in points) or min(map(len, rows)) < LEAST:
        return None
    largest = max(abs(point.value) for point in points)
    return next((closed_form for closed_form in _proposed(rows) if fits(closed_form, points, largest)), None)


@functools.lru_cache(maxsize=4096)
def _closed_form_of_few(values: tuple[float, ...]) -> ClosedForm | None:
    return closed_form_of({0: values})


@functools.lru_cache(maxsize=4096)  # every place in a run is tried as the start of a loop
def closed_form_of_iterations(values: tuple[float, ...]) -> tuple[ClosedForm | None, int]:
    """The closed form of the iterations of one trace, and for how many iterations from the first it holds."""
    if len(set(values[:LEAST])) == 1:
        return None, 0
    few = _closed_form_of_few(values[:LEAST])
    closed_form = few and (closed_form_of({0: values}) or few)  # more values determine the constants better
    if closed_form is None:
        return None, 0
    points = [Point(iteration, 0, float(value)) for iteration, value in enumerate(values)]
    largest = max(abs(point.value) for point in points)
    fitting = itertools.takewhile(lambda point: fits(closed_form, [point], largest), points)
    return closed_form, sum(1 for _ in fitting)


def closed_form_of_length(values: Mapping[int, float]) -> Ratio | Applied | None:
    """The closed form of a number that is the same in every iteration; None if it has none of the usual forms.

    Args:
        values: Length → value, for at least three lengths; the first value determines the scale.
    """
    points = [Point(0, length, value) for length, value in values.items()]
    if not all(math.isfinite(value) and value for value in values.values()):
        return None
    largest = max(abs(value) for value in values.values())
    return next(
        (closed_form for closed_form in _of_length(points[0]) if fits(closed_form, points, largest)), None
    )


def _of_length(first: Point) -> Iterator[Ratio | Applied]:
    one, near = Line(0, 0, 1), [Line(0, 1, rest) for rest in (0, -1, 1, -2, 2)]
    names: tuple[str | float, ...] = (*_EXPONENTS, "log")
    plain: list[Ratio | Applied] = [
        *(Ratio(line, one) for line in near),
        *(Ratio(one, line) for line in near),
        *(Ratio(a, b) for a, b in itertools.permutations(near, 2)),
        *(Applied(name, Ratio(line, one)) for name in names for line in near),
    ]
    for closed_form in plain:
        try:
            scales = list(_round(first.value / closed_form.at(0, first.length)))
        except ArithmeticError:
            continue
        yield from (replace(closed_form, scale=scale) for scale in scales)


def fits(closed_form: ClosedForm, points: Sequence[Point], largest: float) -> bool:
    """Whether a closed form gives these values, to the last digits of float64.

    Args:
        closed_form: The closed form.
        points: Iterations and lengths with their values.
        largest: How large the values become.
    """
    try:
        for iteration, length, value in points:
            size = max(closed_form.size(iteration, length), abs(value))
            # A sum that Python adds to is rounded again in every iteration.
            digits = _LAST_DIGITS * (1 + iteration / 8)
            if size > _CANCELLED * largest or abs(closed_form.at(iteration, length) - value) > digits * size:
                return False
        return True
    except (ArithmeticError, TypeError, ValueError):  # a negative base: a complex number
        return False


def _proposed(rows: Sequence[Sequence[Point]]) -> Iterator[ClosedForm]:
    yield from _ratios(rows)
    yield from _powers(rows)
    yield from _squares(rows[-1])
    functions: tuple[str | float, ...] = (*_EXPONENTS, *_INVERSE)
    for (shift, scale), function in itertools.product(_OUTER, functions):
        inner = [list(_inverted(row, shift, scale, function)) for row in rows]
        if min(map(len, inner)) >= 3:
            yield from (Applied(function, found, scale, shift) for found in _ratios(inner))
            yield from (Applied(function, found, scale, shift) for found in _powers(inner))


_INVERSE: Mapping[str, Callable[[float], float]] = {
    "cos": math.acos, "sin": math.asin, "exp": math.log, "log": math.exp,
}  # fmt: skip


def _inverted(row: Sequence[Point], shift: float, scale: float, function: str | float) -> Iterator[Point]:
    """What a function was applied to, while the values only rise or only fall: after that, it is ambiguous."""
    values = [point.value for point in row]
    rising = 1 if values[1] > values[0] else -1
    for place, point in enumerate(row):
        if place and (values[place] - values[place - 1]) * rising <= 1e-12 * abs(values[place]):
            return
        value = (point.value - shift) / scale
        try:
            inner = _INVERSE[function](value) if isinstance(function, str) else value ** (1 / function)
        except (ArithmeticError, ValueError):
            return
        if isinstance(inner, complex) or abs(inner) > _HUGE:
            return
        yield point._replace(value=inner)


# Ratios: (a t + b L + c) / (d t + e L + f) = v: (a, …, f) is a null vector of the rows (t, L, 1, -v t, -v L, -v)


def _ratios(rows: Sequence[Sequence[Point]]) -> Iterator[Ratio]:
    points = [point for row in rows for point in row]
    several = len({point.length for point in points}) > 1
    basis = np.array(
        [(iteration, length if several else 0, 1) for iteration, length, _ in points], dtype=np.float64
    )
    values = np.array([point.value for point in points])
    matrix = np.concatenate([basis, -values[:, None] * basis], axis=1)
    norms = np.linalg.norm(matrix, axis=0)
    used = np.flatnonzero(norms)
    _, sizes, vectors = np.linalg.svd(matrix[:, used] / norms[used])
    if len(points) < len(used) or sizes[-1] > _NEAR:
        return
    factors = np.zeros(6)
    factors[used] = vectors[-1] / norms[used]
    contribution = np.abs(factors) * norms
    factors[contribution < _NEAR * contribution.max()] = 0
    above, below = factors[:3], factors[3:]
    if above.any() and below.any():
        yield from _rounded(above, below, points)


def _rounded(above: _Array, below: _Array, points: Sequence[Point]) -> Iterator[Ratio]:
    """Ratios with integers near these factors, and the remaining factor as an integer or a scale."""
    pivot, other = (int(np.flatnonzero(row)[0]) for row in (above, below))
    pairs = [(_line(above / above[pivot], most), _line(below / below[other], most)) for most in _ROUND]
    found = list(dict.fromkeys((a, b) for a, b in pairs if a is not None and b is not None))
    for (numerator, by), (denominator, under) in found:
        scale = float(above[pivot] / below[other]) * under / by
        for most in _ROUND:
            whole = Fraction(scale).limit_denominator(most)
            if whole and abs(float(whole) / scale - 1) < _NEAR and _is_plain(whole):
                ratio = Ratio(_times(numerator, whole.numerator), _times(denominator, whole.denominator))
                yield _positive(ratio, points)
    largest = max(points, key=lambda point: abs(point.value))
    for (numerator, _), (denominator, _) in found:
        ratio = _positive(Ratio(numerator, denominator), points)
        plain = ratio.denominator.at(*largest[:2]) and ratio.at(*largest[:2])
        if plain:
            yield from (replace(ratio, scale=each) for each in _round(largest.value / plain))


def _line(factors: _Array, most: int) -> tuple[Line, int] | None:
    """A line whose integers are near these factors times a common number, and that number; None if there is none."""
    near = [Fraction(float(factor)).limit_denominator(most) for factor in factors]
    far = any(abs(float(a) - b) > _NEAR * abs(b) for a, b in zip(near, factors, strict=True))
    if far or not all(map(_is_plain, near)):
        return None
    common = math.lcm(*(each.denominator for each in near))
    iteration, length, rest = (int(each * common) for each in near)
    return (Line(iteration, length, rest), common) if common < _LARGEST else None


def _is_plain(fraction: Fraction) -> bool:
    return abs(fraction.numerator) * fraction.denominator < _PLAIN


def _times(line: Line, by: int) -> Line:
    return Line(line.iteration * by, line.length * by, line.rest * by)


def _positive(ratio: Ratio, points: Sequence[Point]) -> Ratio:
    """The same with a denominator that is positive, and without a common factor."""
    above, below = ratio.numerator, ratio.denominator
    common = math.gcd(*(abs(n) for line in (above, below) for n in (line.iteration, line.length, line.rest)))
    sign = -1 if below.at(*points[-1][:2]) < 0 else 1
    above, below = (Line(line.iteration // common * sign, line.length // common * sign, line.rest // common * sign)
                    for line in (above, below))  # fmt: skip
    return Ratio(above, below, ratio.scale)


def _round(value: float) -> Iterator[float]:
    """Candidates for a constant, roundest first: with few digits, as a fraction of pi, unrounded."""
    for digits in range(1, 13):
        near = float(f"{value:.{digits}g}")
        if abs(near - value) <= _NEAR * abs(value):
            yield near
    part = Fraction(value / math.pi).limit_denominator(64)
    if part and abs(float(part) * math.pi - value) <= _NEAR * abs(value):
        yield math.pi * part.numerator / part.denominator
    yield value


def _squares(row: Sequence[Point]) -> Iterator[Applied]:
    """Polynomials of degree two, the same at each length: `scale * (t + place) ** 2 + shift`."""
    values = [point.value for point in row]
    scale = (values[2] - 2 * values[1] + values[0]) / 2
    if not scale:
        return
    for most in (2, 64):
        place = Fraction((values[1] - values[0] - scale) / (2 * scale)).limit_denominator(most)
        line = Line(place.denominator, 0, place.numerator)
        inner = Ratio(line, Line(0, 0, place.denominator))
        for factor in itertools.islice(_round(scale), 4):
            yield Applied(2.0, inner, factor, values[0] - factor * float(place) ** 2)


# Powers: shift + scale * base ** (± t + k L + n)


def _powers(rows: Sequence[Sequence[Point]]) -> Iterator[Power]:
    longest = max(rows, key=len)
    values = np.array([point.value for point in longest])
    steps = np.diff(values)
    for shift, series in ((False, values), (True, steps)):
        place = int(np.argmax(np.abs(series[:-1]) + np.abs(series[1:])))
        if not series[place] or not series[place + 1]:
            continue
        base = float(series[place + 1] / series[place])
        off = np.abs(series[1:] - base * series[:-1]).max()
        if abs(base - 1) < _NEAR or not off <= _NEAR * np.abs(series).max():
            continue
        shifts = [0.0]
        if shift:
            if base < 0:
                continue  # two alternating numbers would be one; rather, an iteration has two steps
            start = float(values[place] - steps[place] / (base - 1))
            shifts = list(itertools.islice(_round(start), 4))
        for each, sign in itertools.product(shifts, (1, -1)):
            for round_base in itertools.islice(_round(base**sign), 4):
                yield from _with_base(rows, round_base, sign, each)


def _with_base(rows: Sequence[Sequence[Point]], base: float, sign: int, shift: float) -> Iterator[Power]:
    """Powers of a base with the exponents and scales that the values suggest."""
    if base == 0:
        return
    logarithm, scales = math.log(abs(base)), []
    for row in rows:
        point = max(row, key=lambda point: abs(point.value - shift))
        try:
            scales.append((point.length, (point.value - shift) * base ** (-sign * point.iteration)))
        except ArithmeticError:
            return
    if not logarithm:
        slope = 0
    elif any(scale == 0 for _, scale in scales):
        return
    else:
        (first, least), (last, most) = scales[0], scales[-1]
        slope = round(math.log(abs(most / least)) / logarithm / (last - first)) if last != first else 0
    try:
        scale = scales[-1][1] * base ** (-slope * scales[-1][0])
    except ArithmeticError:
        return
    if not scale:
        return
    if logarithm:
        rest = round(math.log(abs(scale)) / logarithm)
        if abs(rest) < 4096:
            yield Power(base, Line(sign, slope, rest), math.copysign(1.0, scale) * _parity(base, rest), shift)
    yield from (Power(base, Line(sign, slope, 0), each, shift) for each in itertools.islice(_round(scale), 4))


def _parity(base: float, exponent: int) -> float:
    """The sign of `base ** exponent`."""
    return -1.0 if base < 0 and exponent % 2 else 1.0
