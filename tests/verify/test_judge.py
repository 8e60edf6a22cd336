import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_export.errors import UsageError
from moe_export.verify import DEFAULTS, FlipBudget, Margin, Tolerance, Worst, judge
from moe_export.verify.judging.tolerance import parse_tolerances
from moe_export.verify.judging.truth import judge_rounded

MARGIN = Margin(1e-5, 1e-5)
NAN, INF = float("nan"), float("inf")


def floats(*values, dtype=np.float32):
    return np.array(values, dtype)


def verdict(reference, candidate, margin=MARGIN):
    return judge("y", reference, candidate, margin)


def test_equal_floats_report_the_largest_difference():
    found = verdict(floats(1, 2, 4), floats(1, 2, 4.00002))
    assert found.ok
    assert found.reason is None
    assert found.max_abs == pytest.approx(2e-5, rel=0.05)
    assert found.max_rel == pytest.approx(5e-6, rel=0.05)
    assert found.worst.index == (2,)
    assert (found.bad, found.total, found.margin) == (0, 3, MARGIN)


def test_a_wrong_element_is_counted_and_shown():
    found = verdict(np.ones((2, 3)), np.array([[1, 1, 1], [1, 1.5, 1.25]]))
    assert not found.ok
    assert found.reason == "2 of 6 elements beyond rtol=1e-05 atol=1e-05"
    assert found.worst == Worst((1, 1), 1.5, 1.0)
    assert (found.max_abs, found.max_rel, found.bad) == (0.5, 0.5, 2)


def test_the_worst_is_the_furthest_beyond_tolerance_not_the_largest_difference():
    found = verdict(floats(1e6, 1), floats(1e6 + 5, 2))
    assert found.worst.index == (1,)
    assert found.bad == 1


@given(
    hnp.arrays(np.float64, 5, elements=st.floats(-1e6, 1e6) | st.sampled_from([NAN, INF, -INF, 0.0])),
    hnp.arrays(np.float64, 5, elements=st.sampled_from([0, 1e-7, 1e-5, 2e-5, 1e-3, 1]) | st.just(NAN)),
)
def test_floats_agree_with_numpys_assert_allclose(reference, noise):
    candidate = reference + noise
    try:
        np.testing.assert_allclose(candidate, reference, rtol=1e-5, atol=1e-5)
        expected = True
    except AssertionError:
        expected = False
    assert verdict(reference, candidate).ok == expected


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, min_side=0)))
def test_an_array_equals_itself_whatever_is_in_it(array):
    assert verdict(array, array.copy(), Margin(0, 0)).ok


@pytest.mark.parametrize(
    ("reference", "candidate", "reason"),
    [
        ((1, 2), (NAN, NAN), "all of 2 elements are NaN, the reference's are not"),
        ((1, 2, 3), (1, NAN, 3), "1 of 3 elements are NaN, the reference's are not"),
        ((NAN, 1), (0, 1), "NaN or Inf in other places than the reference, 1 of 2"),
        ((INF, 1), (-INF, 1), "NaN or Inf in other places than the reference, 1 of 2"),
        ((INF, 1), (1e30, 1), "NaN or Inf in other places than the reference, 1 of 2"),
        ((1e30, 1), (INF, 1), "NaN or Inf in other places than the reference, 1 of 2"),
    ],
)
def test_nan_and_inf_must_be_where_the_reference_has_them(reference, candidate, reason):
    found = verdict(floats(*reference), floats(*candidate))
    assert found.reason == reason
    assert not math.isfinite(found.worst.candidate) or not math.isfinite(found.worst.reference)


def test_the_same_nan_and_inf_are_equal_and_nans_are_counted():
    values = floats(NAN, INF, -INF, 1)
    found = verdict(values, values.copy())
    assert found.ok
    assert (found.nans, found.max_abs) == (1, 0.0)
    everywhere = verdict(floats(NAN, NAN), floats(NAN, NAN))
    assert everywhere.ok
    assert everywhere.nans == everywhere.total == 2
    assert math.isnan(everywhere.max_abs)


def test_shapes_are_never_broadcast():
    found = verdict(np.ones((3, 1)), np.ones((1, 3)))
    assert found.reason == "shape [1, 3], expected [3, 1]"
    assert found.bad == 3
    assert not verdict(np.ones((2, 3)), np.ones(3)).ok
    assert not verdict(np.ones(()), np.ones(1)).ok


def test_the_dtype_is_part_of_the_answer():
    assert verdict(np.ones(2, np.float32), np.ones(2, np.float64)).reason == "dtype float64, expected float32"
    assert verdict(np.ones(2, np.int64), np.ones(2, np.int32)).reason == "dtype int32, expected int64"
    assert verdict(np.ones(2, bool), np.ones(2, np.int64)).reason == "dtype int64, expected bool"


def test_missing_and_extra_outputs():
    assert verdict(np.ones((2, 3)), None).reason == "missing, expected float64[2, 3]"
    assert verdict(None, np.ones((2, 3))).reason == "extra output float64[2, 3]"


def test_integers_and_bools_are_exact():
    assert verdict(np.array([1, 2**60]), np.array([1, 2**60])).ok
    assert not verdict(np.array([2**60]), np.array([2**60 + 1])).ok  # equal as float64
    found = verdict(np.array([3, 0], np.uint8), np.array([3, 255], np.uint8))
    assert (found.max_abs, found.worst) == (255.0, Worst((1,), 255, 0))
    found = verdict(np.array([True, False]), np.array([True, True]))
    assert found.reason == "1 of 2 elements differ"
    assert found.worst == Worst((1,), True, False)


def test_empty_and_scalar_arrays():
    empty = verdict(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32))
    assert empty.ok
    assert (empty.max_abs, empty.worst, empty.total) == (0.0, None, 0)
    assert not verdict(np.zeros((0, 4)), np.zeros((4, 0))).ok
    assert verdict(np.array(1.0), np.array(2.0)).worst == Worst((), 2.0, 1.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_narrow_floats_are_judged_in_their_own_tolerance(dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    step = float(ml_dtypes.finfo(kind).eps)
    margin = Tolerance().of("y", dtype)
    reference = np.ones(3, kind)
    assert verdict(reference, reference + np.array(step, kind), margin).ok
    far = verdict(reference, (reference.astype(np.float64) * (1 + 12 * step)).astype(kind), margin)
    assert not far.ok
    assert far.dtype == dtype


def test_differences_near_the_end_of_the_range_do_not_overflow_into_agreement():
    found = verdict(np.array([1.7e308]), np.array([-1.7e308]))
    assert found.bad == 1


def test_an_outputs_own_tolerance_wins_then_the_users_then_the_dtypes():
    tolerance = Tolerance(rtol=1e-2, outputs={"loss": Margin(0, 0.5)})
    assert tolerance.of("loss", "float32") == Margin(0, 0.5)
    assert tolerance.of("y", "float32") == Margin(1e-2, 1e-5)
    assert Tolerance().of("y", "bfloat16") == DEFAULTS["bfloat16"]
    assert Tolerance().of("y", "int64") == DEFAULTS["float32"]
    assert DEFAULTS["float32"] == Margin(1e-5, 1e-5)


def test_wider_types_have_tighter_tolerances():
    order = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
    widths = [DEFAULTS[name].rtol for name in order]
    assert widths == sorted(widths)
    for name in order:
        assert DEFAULTS[name].rtol > float(ml_dtypes.finfo(np.dtype(getattr(ml_dtypes, name, name))).eps)


@pytest.mark.parametrize("bad", [-1e-5, NAN, INF])
def test_a_senseless_tolerance_is_refused(bad):
    with pytest.raises(UsageError, match="a tolerance must be finite and not negative"):
        Tolerance(rtol=bad)
    with pytest.raises(UsageError, match="a tolerance must be finite"):
        Margin(0, bad)


def test_tolerances_and_budgets_as_they_are_written():
    assert parse_tolerances(["y=1e-3,1e-4", "a=b=0,1"]) == {"y": Margin(1e-3, 1e-4), "a=b": Margin(0, 1)}
    for text in ("y=1e-3", "1,2", "y", "y=1,2,3", "=1,2"):
        with pytest.raises(UsageError, match="--tolerance"):
            parse_tolerances([text])
    assert Tolerance(outputs=parse_tolerances(["z=1,1"])).unknown(["y"]) == ["z"]
    assert (FlipBudget.parse("0.5%"), FlipBudget.parse("3")) == (FlipBudget(0.005), FlipBudget(3, False))
    assert [str(FlipBudget.parse(text)) for text in ("0.5%", "3")] == ["0.5%", "3"]
    for text in ("", "x", "-1%", "101%", "1.5", "-1"):
        with pytest.raises(UsageError, match="--flips is a share"):
            FlipBudget.parse(text)


def test_rounded_weights_give_room_for_what_they_move():
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((40, 50)).astype(np.float32) * 8
    rounded = reference + 1e-3 * generator.standard_normal((40, 50)).astype(np.float32)
    rounded[3] += 5  # a token that went to another expert says nothing of rounding
    candidate = reference + 3e-3 * generator.standard_normal((40, 50)).astype(np.float32)
    found = judge("y", reference, candidate, Margin(1e-3, 1e-3))
    assert not found.ok
    room = judge_rounded(found, reference, candidate, rounded, "float16")
    assert room.ok
    assert room.rounding == pytest.approx(1e-3, rel=0.1)
    assert room.margin == Margin(1e-3, 1e-3 + 16 * room.rounding)
    wrong = candidate.copy()
    wrong[5, 5] += 0.1
    assert not judge_rounded(
        judge("y", reference, wrong, Margin(1e-3, 1e-3)), reference, wrong, rounded, "float16"
    ).ok
    wild = reference + 0.2 * generator.standard_normal((40, 50)).astype(np.float32)
    assert judge_rounded(found, reference, candidate, wild, "float16") is found  # too sensitive to tell
    assert judge_rounded(found, reference, candidate, None, "float16") is found
