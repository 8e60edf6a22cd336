"""For which sizes a graph is right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_export.domain import Condition, Domain, evaluate
from moe_export.errors import UsageError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("s0", 3),
        ("2*s0", 6),
        ("s0 + 1", 4),
        ("4*(s0 - s1) + 2", -2),
        ("-s0", -3),
        ("7", 7),
        ("s1 // s0", 1),
        ("max(s0, s1) % 3", 1),
        ("ceil(s0 / 2)", 2),
        ("batch-size", 9),
    ],
)
def test_expressions(expression, value):
    assert evaluate(expression, {"s0": 3, "s1": 4, "batch-size": 9}) == value


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(0, 99))
def test_affine_expressions_agree_with_arithmetic(a, b, n):
    assert evaluate(f"{a}*n + {b}", {"n": n}) == a * n + b


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("s9", "dimension 's9' has no range"),
        ("2*s9", "dimension 's9' has no range"),
        ("s0 @ 2", "dimension 's0 @ 2': only names, integers, arithmetic and comparisons are understood"),
        ("__import__('os').getcwd()", "only names, integers"),
        ("s0.real", "only names, integers"),
        ("1.5", "only integers are sizes"),
        ("s0 == 3", "only integers are sizes"),
        ("True", "only names, integers"),
        ("s0 +", "neither a name nor an expression"),
    ],
)
def test_expressions_that_are_refused(expression, message):
    with pytest.raises(UsageError, match=message):
        evaluate(expression, {"s0": 3})


def test_an_unknown_dimension_is_told_the_known_ones():
    with pytest.raises(UsageError) as caught:
        evaluate("sequence", {"batch": 2, "s0": 3})
    assert (
        str(caught.value) == "dimension 'sequence' has no range\n  hint: dimensions with a range: batch, s0"
    )


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("sequence <= 64", 64, 65),
        ("sequence % 8 == 0", 16, 17),
        ("(sequence + 63)//64 != 1", 65, 64),
        ("1 < sequence <= 9", 9, 10),
        ("not sequence > 4 or sequence == 6", 6, 5),
        ("sequence >= 2 and sequence < 5", 4, 5),
        ("int(sequence * 1.25 / 4) == 3", 10, 13),
        ("12 // (sequence - 4) > 0", 5, 4),  # no size at which it cannot be told
    ],
)
def test_a_condition_holds_up_to_its_constant_and_not_beyond(text, right, wrong):
    condition = Condition(text)
    assert condition.holds({"sequence": right}) is True
    assert condition.holds({"sequence": wrong}) is False
    assert condition.names == {"sequence"}
    if "//" not in text:  # NumPy divides by zero
        many = condition.holds({"sequence": np.arange(200)})
        assert many[right]
        assert not many[wrong]


def test_a_domain_holds_where_all_of_it_does():
    domain = Domain.of("batch*sequence <= 256", "sequence % 4 == 0")
    assert domain.holds({"batch": 4, "sequence": 64})
    assert not domain.holds({"batch": 5, "sequence": 64})
    assert not domain.holds({"batch": 1, "sequence": 63})
    assert Domain().holds({"sequence": 1})
    assert str(domain) == "batch*sequence <= 256 and sequence % 4 == 0"


def test_the_sizes_near_a_domains_constants():
    domain = Domain.of("batch <= 9", "sequence <= 60")
    assert domain.near("sequence") == (59, 60, 61, 120, 121)
    assert domain.near("other") == ()


@pytest.mark.parametrize(
    "text", ["__import__('os').system('true')", "open('f')", "sequence.bit_length()", "[1]"]
)
def test_what_a_file_says_is_not_run(text):
    with pytest.raises(UsageError):
        Condition(text)
