"""A report judged again says what judging the arrays again would say."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_export.errors import UsageError
from moe_export.verify import (
    CaseResult,
    FlipBudget,
    Margin,
    Report,
    RoutingPair,
    Tolerance,
    judge,
    judge_routing,
)
from moe_export.verify.reports.reading import judge_again, read_report

MARGIN = Margin(1e-5, 1e-5)
NUMBERS = st.floats(-1e6, 1e6) | st.sampled_from([float("nan"), float("inf"), 0.0])


def report(*judgements, label="example", **options):
    case = CaseResult(label, 3, (("n", 2),), "compared", None, judgements)
    return Report("torch", "onnxruntime-cpu", (case,), 1, **options)


def again(found, rtol=None, atol=None, outputs=None, budget=None):
    read = read_report(found.to_json())
    return judge_again(read, Tolerance(rtol, atol, outputs or {}), budget)


@given(
    hnp.arrays(np.float64, 8, elements=NUMBERS),
    hnp.arrays(np.float64, 8, elements=st.sampled_from([0, 1e-9, 1e-6, 1e-4, 0.1, 3.0])),
    st.sampled_from([0, 1e-9, 1e-7, 1e-5, 1e-3, 1]),
    st.sampled_from([0, 1e-9, 1e-7, 1e-5, 1e-3, 1]),
)
def test_judging_the_report_is_judging_the_arrays(reference, noise, rtol, atol):
    found = report(judge("y", reference, reference + noise, MARGIN))
    direct = judge("y", reference, reference + noise, Margin(rtol, atol))
    assert again(found, rtol, atol).rows[0].equal == direct.ok


def test_no_tolerance_finishes_what_a_time_limit_cut_off():
    cut = report(judge("y", np.ones(2), np.ones(2), MARGIN), left_out=("zeros",))
    found = again(cut, rtol=1.0)
    assert (found.verdict, found.exit_code, found.left_out) == ("unfinished", 5, ("zeros",))
    older = json.loads(cut.to_json())
    del older["left_out"]
    assert read_report(json.dumps(older)).verdict == "equal"


def test_a_report_comes_back_as_it_was():
    wrong = judge("y", np.array([1.0, np.nan]), np.array([2.0, np.inf]), MARGIN)
    found = report(
        wrong, judge("n", np.array([1]), np.array([2]), MARGIN), budget=FlipBudget(0.005), about={"a": "b"}
    )
    read = read_report(found.to_json())
    assert read.to_json() == found.to_json()
    assert (read.verdict, read.budget, read.about) == ("not equal", FlipBudget(0.005), {"a": "b"})


def test_it_says_what_would_do():
    found = report(judge("y", np.array([10.0]), np.array([10.5]), MARGIN))
    assert "rtol 5.00e-02 would do" in again(found, 1e-3, 0).rows[0].reason
    assert again(found, 0.0501, 0).exit_code == 0
    assert again(found, 0, 0.5).exit_code == 0
    assert again(found).exit_code == 1
    assert again(found, outputs={"y": Margin(0, 1)}).exit_code == 0


def test_no_tolerance_excuses_what_is_wrong_in_kind():
    for pair in (
        (np.ones((3, 1)), np.ones((1, 3))),
        (np.ones(2), np.ones(2, np.float32)),
        (np.ones(2), None),
        (None, np.ones(2)),
        (np.array([1.0]), np.array([np.nan])),
        (np.array([1]), np.array([2])),
        (np.array([True]), np.array([False])),
    ):
        assert again(report(judge("y", *pair, MARGIN)), 1e9, 1e9).exit_code == 1


def routed(gap):
    scores = np.array([[0.1, 0.3, 0.4, 0.3 - gap]], np.float32)
    reference = {"idx": np.array([[2, 1]]), "scores": scores}
    pair = RoutingPair("idx", None, "scores")
    return judge_routing(pair, reference, {"idx": np.array([[3, 2]])}, Tolerance())[0]


def test_flips_are_judged_again_at_a_margin_of_their_own():
    assert report(routed(1e-3)).exit_code == 1
    assert again(report(routed(1e-3)), outputs={"idx": Margin(0, 2e-3)}).exit_code == 0
    assert again(report(routed(1e-6)), outputs={"idx": Margin(0, 0)}).exit_code == 1
    assert again(report(routed(1e-6)), 1e-12, 1e-12).exit_code == 1  # as running again would say
    assert again(report(routed(1e-6)), budget=FlipBudget(0, False)).exit_code == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the report is no JSON"),
        ("[]", "the report's schema is None"),
        ('{"schema": "moe-export/verify-report/1"}', "schema is 'moe-export/verify-report/1'"),
        ('{"schema": "moe-export/verify-report/2"}', "the report is damaged: KeyError"),
    ],
)
def test_what_is_no_report(text, message):
    with pytest.raises(UsageError, match=message):
        read_report(text)


def test_the_json_stays_small():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(1000, 1000)).astype(np.float32)
    noise = 1e-7 * rng.normal(size=reference.shape).astype(np.float32)
    text = report(judge("y", reference, reference + noise, MARGIN)).to_json()
    assert len(text) < 5_000
    assert json.loads(text)["cases"][0]["judgements"][0]["decades"]
