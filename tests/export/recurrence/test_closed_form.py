"""The closed form behind numbers of steps: found from three short lengths, right at thousands of steps; or none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from moe_export.export.recurrence.closed_form_fit import (
    closed_form_of,
    closed_form_of_iterations,
    closed_form_of_length,
)

LENGTHS = (6, 7, 9)
FOUND: dict[str, Callable[[int, int], float]] = {
    "t / L": lambda t, n: t / n,
    "(L - t) / L": lambda t, n: 1 - t / n,
    "t / (L - 1)": lambda t, n: t / (n - 1),
    "(2 * t + 3) / 2": lambda t, n: t + 1.5,
    "(199 * t + L - 1) / (10000 * L - 10000)": lambda t, n: 1e-4 + (0.02 - 1e-4) * t / (n - 1),
    "10 / (t + 10)": lambda t, n: 1 / (1 + 0.1 * t),
    "1 / (L - t)": lambda t, n: 1 / (n - t),
    "3.141592653589793 * t / L": lambda t, n: math.pi * t / n,
    "0.0123456789 * t": lambda t, n: 0.0123456789 * t,
    "0.9 ** t": lambda t, n: 0.9**t,
    "0.96875 ** (L - t - 1)": lambda t, n: (1 - 2**-5) ** (n - 1 - t),
    "0.1 * 0.5 ** t": lambda t, n: 0.1 * 0.5**t,
    "1.0 - 0.999 ** (t + 1)": lambda t, n: 1 - 0.999 ** (t + 1),
    "(1.0 - 0.999 ** (t + 1)) ** 0.5": lambda t, n: math.sqrt(1 - 0.999 ** (t + 1)),
    "(1.0 - 0.9 ** (t + 1)) ** -1.0": lambda t, n: 1 / (1 - 0.9 ** (t + 1)),
    "(-1.0) ** t": lambda t, n: (-1) ** t,
    "(t) ** 2.0": lambda t, n: t * t,
    "-0.25 + ((2 * t + 3) / 2) ** 2.0": lambda t, n: (t + 1) * (t + 2),
    "cos(t / 10000)": lambda t, n: math.cos(t / 10000),
    "cos(6.283185307179586 * t / L)": lambda t, n: math.cos(2 * math.pi * t / n),
    "0.5 + 0.5 * cos(3.141592653589793 * t / L)": lambda t, n: 0.5 * (1 + math.cos(math.pi * t / n)),
    "exp((-5 * t) / L)": lambda t, n: math.exp(-5 * t / n),
    "log(t + 2)": lambda t, n: math.log(t + 2),
}
NONE: dict[str, Callable[[int, int], float]] = {
    "saturated": lambda t, n: math.tanh(t),
    "clipped": lambda t, n: min(1.0, t / 4),
    "in turn": lambda t, n: (0.5, 0.25)[t % 2],
    "of three": lambda t, n: float(t % 3),
    "first apart": lambda t, n: 0.9 if t else 0.0,
    "two that take iterations": lambda t, n: (t // 2) / n if t % 2 else 1 - (t // 2) / n,
    "scattered": lambda t, n: math.sin(1000 * t * t),
    "another at each length": lambda t, n: t * (0.1, 0.2, 0.7, 0.4)[n % 4],
    "cubes": lambda t, n: (t + 1) ** 3 + t,
    "too large": lambda t, n: 10**400 * (t + 1),
    "not finite": lambda t, n: math.inf if t == 3 else float(t),
}


@pytest.mark.parametrize("text", list(FOUND))
def test_a_closed_form_is_found_and_right_at_any_length(text: str) -> None:
    function = FOUND[text]
    closed_form = closed_form_of({n: [function(t, n) for t in range(n)] for n in LENGTHS})
    assert str(closed_form) == text
    for n in (2, 5, 100, 5000):
        for t in (0, 1, n // 2, n - 1):
            wanted = function(t, n)
            assert closed_form is not None
            assert math.isclose(closed_form.at(t, n), wanted, rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("name", list(NONE))
def test_there_is_no_closed_form(name: str) -> None:
    function = NONE[name]
    assert closed_form_of({n: [function(t, n) for t in range(n)] for n in LENGTHS}) is None


def test_a_closed_form_of_one_trace_holds_for_its_first_iterations() -> None:
    closed_form, iterations = closed_form_of_iterations((1.0, 0.5, 0.25, 0.125, 0.0625, 0.7, 0.7))
    assert (str(closed_form), iterations) == ("0.5 ** t", 5)


def test_a_sum_that_python_adds_to_is_as_good_as_a_product() -> None:
    columns = {n: [sum([0.1] * (t + 1)) for t in range(n)] for n in (15, 16, 18, 21)}
    assert str(closed_form_of(columns)) == "(t + 1) / 10"


def test_four_iterations_are_too_few() -> None:
    assert closed_form_of({4: [0.1, 0.2, 0.3, 0.4]}) is None


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("1 / L", lambda n: 1 / n),
        ("(L - 1) / L", lambda n: (n - 1) / n),
        ("(L) ** -0.5", lambda n: n**-0.5),
        ("log(L)", math.log),
        ("3.0 * 1 / (L + 1)", lambda n: 3 / (n + 1)),
    ],
)
def test_a_number_of_the_length_alone(text: str, function: Callable[[int], float]) -> None:
    closed_form = closed_form_of_length({n: function(n) for n in LENGTHS})
    assert str(closed_form) == text


def test_any_numbers_of_three_lengths_have_no_closed_form() -> None:
    assert closed_form_of_length({6: 0.3, 7: 0.31, 9: 0.34}) is None
