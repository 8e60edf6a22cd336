"""The few elements that a report keeps decide as all of them do."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_export.verify import Margin, judge
from moe_export.verify.judging.sketch import MOST, decades_of, front_of, holds, needed_rtol

VALUES = st.floats(0, 1e6, width=32)


def decided(sizes, differences, margin):
    return not (differences - (margin.atol + margin.rtol * sizes) > 0).any()


@given(
    hnp.arrays(np.float64, 30, elements=VALUES),
    hnp.arrays(np.float64, 30, elements=VALUES),
    st.floats(0, 10),
    st.floats(0, 10),
)
def test_the_front_decides_exactly_as_all_elements_do(sizes, differences, rtol, atol):
    margin = Margin(rtol, atol)
    assert holds(front_of(sizes, differences), margin) == decided(sizes, differences, margin)


def test_a_front_of_many_points_is_thinned_and_decides_the_same():
    sizes = np.linspace(0, 1, 5000)
    differences = sizes**2 + 0.01  # every element is harder than those before it
    front = front_of(sizes, differences)
    assert len(front) <= 2 < MOST
    for rtol in np.linspace(0, 3, 37):
        for atol in np.linspace(0, 1.2, 37):
            margin = Margin(rtol, atol)
            assert holds(front, margin) == decided(sizes, differences, margin)


def test_the_least_rtol_that_passes():
    front = front_of(np.array([1.0, 100.0]), np.array([0.5, 1.0]))
    assert needed_rtol(front, 0.0) == 0.5
    assert needed_rtol(front, 0.5) == 0.005
    assert needed_rtol(front_of(np.array([0.0]), np.array([1.0])), 0.5) == float("inf")
    assert holds(front, Margin(0.5, 0))
    assert not holds(front, Margin(0.49, 0))


def test_decades():
    assert decades_of(np.array([0.0, np.nan, 0.02, 0.03, 5.0])) == ((-2, 2), (0, 1))
    assert decades_of(np.zeros(3)) == ()


def test_a_judgement_keeps_what_no_tolerance_excuses():
    margin = Margin(1e-5, 1e-5)
    found = judge("y", np.array([1.0, np.nan, 2.0]), np.array([1.5, 1.0, 2.0]), margin)
    assert (found.odd, found.front) == (1, ((1.0, 0.5),))
    assert judge("y", np.array([1, 2]), np.array([1, 3]), margin).odd == 1
    assert judge("y", np.ones((3, 1)), np.ones((1, 3)), margin).odd == 3
    assert judge("y", np.ones((0, 1)), np.ones((1, 0)), margin).odd == 1
