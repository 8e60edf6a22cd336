"""`ClosedForm`: a number that Python computed from the step's number, as a function of the iteration and the length.

    x[:, t] / (t + 1)       an integer that counts: an `InductionVariable`, which needs no closed form
    1 - t / L               Ratio     (L - t) / L
    0.9 ** (L - 1 - t)      Power     0.9 ** (L - t - 1)
    math.cos(t / 100)       Applied   cos(t / 100)

A trace only has the values. `closed_form_fit` finds their closed form; `induction_sequences` writes it as a sequence
that the loop runs over: integers and their ratios without float64, everything else in float64, rounded once to the type
that the step computes in.

Letters: t iteration of the loop, from 0; L length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FUNCTIONS: Mapping[str, Callable[[float], float]] = {
    "cos": math.cos, "sin": math.sin, "exp": math.exp, "log": math.log,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """The integer `iteration * t + length * L + rest`."""

    iteration: int
    length: int
    rest: int

    def at(self, iteration: int, length: int) -> int:
        """The value in an iteration, at a length."""
        return self.iteration * iteration + self.length * length + self.rest

    def __str__(self) -> str:
        text = ""
        for factor, letter in sorted(((self.iteration, "t"), (self.length, "L")), reverse=True):
            if factor:
                sign = (" - " if factor < 0 else " + ") if text else ("-" if factor < 0 else "")
                text += sign + (letter if abs(factor) == 1 else f"{abs(factor)} * {letter}")
        if not text:
            return str(self.rest)
        return text + (f" {'-' if self.rest < 0 else '+'} {abs(self.rest)}" if self.rest else "")


@dataclass(frozen=True)
class Ratio:
    """`scale * (numerator / denominator)`."""

    numerator: Line
    denominator: Line
    scale: float = 1.0

    def at(self, iteration: int, length: int) -> float:
        """The value in an iteration, at a length, as Python computes it."""
        return self.scale * (self.numerator.at(iteration, length) / self.denominator.at(iteration, length))

    def size(self, iteration: int, length: int) -> float:
        """The magnitude of the largest term of the value, to which its rounding error is relative."""
        below = abs(self.denominator.at(iteration, length))
        line = self.numerator
        terms = (line.iteration * iteration, line.length * length, line.rest)
        return abs(self.scale) * max(abs(term) for term in terms) / below

    def __str__(self) -> str:
        scale = "" if self.scale == 1 else f"{self.scale!r} * "
        if str(self.denominator) == "1":
            return scale + (_grouped(self.numerator) if scale else str(self.numerator))
        return f"{scale}{_grouped(self.numerator)} / {_grouped(self.denominator)}"


@dataclass(frozen=True)
class Power:
    """`shift + scale * base ** exponent`."""

    base: float
    exponent: Line
    scale: float = 1.0
    shift: float = 0.0

    def at(self, iteration: int, length: int) -> float:
        """The value in an iteration, at a length, as Python computes it."""
        power: float = float(self.base) ** self.exponent.at(iteration, length)
        return self.shift + self.scale * power

    def size(self, iteration: int, length: int) -> float:
        """The magnitude of the largest term of the value, to which its rounding error is relative."""
        return max(abs(self.shift), abs(self.at(iteration, length)))

    def __str__(self) -> str:
        base = f"({self.base!r})" if self.base < 0 else repr(self.base)
        return _outer(self.shift, self.scale, f"{base} ** {_grouped(self.exponent)}")


@dataclass(frozen=True)
class Applied:
    """`shift + scale * function(inner)`; a number in the place of the function's name is an exponent."""

    function: str | float
    inner: Ratio | Power
    scale: float = 1.0
    shift: float = 0.0

    def at(self, iteration: int, length: int) -> float:
        """The value in an iteration, at a length, as Python computes it."""
        return self.shift + self.scale * self._applied(self.inner.at(iteration, length))

    def size(self, iteration: int, length: int) -> float:
        """The magnitude of the largest term of the value; more where the function amplifies its argument's rounding."""
        inner = self.inner.at(iteration, length)
        size = max(abs(self.shift), abs(self.scale * self._applied(inner)))
        if self.function in ("cos", "sin", "exp"):
            return size * (1 + self.inner.size(iteration, length))
        return max(size, abs(self.scale)) if self.function == "log" else size

    def _applied(self, value: float) -> float:
        if isinstance(self.function, str):
            return FUNCTIONS[self.function](value)
        power: float = value**self.function
        return power

    def __str__(self) -> str:
        if isinstance(self.function, str):
            return _outer(self.shift, self.scale, f"{self.function}({self.inner})")
        return _outer(self.shift, self.scale, f"({self.inner}) ** {self.function}")


def _grouped(line: Line) -> str:
    return f"({line})" if " " in str(line) or str(line)[0] == "-" else str(line)


def _outer(shift: float, scale: float, text: str) -> str:
    if scale not in (1, -1):
        text = f"{scale!r} * {text}"
    if not shift:
        return f"-{text}" if scale == -1 else text
    return f"{shift!r} {'-' if scale == -1 else '+'} {text}"


ClosedForm = Ratio | Power | Applied


@dataclass(frozen=True)
class OfLength:
    """A number that is the same in every iteration, but changes with the length: `1 / L`."""

    closed_form: ClosedForm

    def __str__(self) -> str:
        return str(self.closed_form)
