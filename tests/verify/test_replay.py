"""Ties inside a model, and what a float64 run says."""

import numpy as np
import pytest
import torch

from moe_export.verify import (
    Choice,
    DimRange,
    FlipBudget,
    Margin,
    Replay,
    RoutingPair,
    TensorSpec,
    Tolerance,
    TorchRunner,
    cases,
    compare,
)
from moe_export.verify.judging.replay import NO_REPLAY, judge_choices

SPECS = [TensorSpec("x", "float32", ("batch", 4))]
DIMS = [DimRange("batch", 6)]
EXPERTS = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32))


def inputs(**options):
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    return cases(SPECS, DIMS, {"x": x}, **options)


def moe(tensors, ids=None, lowest_first=True, wrong=0.0):
    """Top-1 of the values; expert e adds row e. The experts are no output."""
    x = tensors["x"]
    order = x if lowest_first else x.flip(-1)
    own = order.topk(1).indices
    own = own if lowest_first else 3 - own
    taken = own if ids is None else ids
    return x + EXPERTS[taken[:, 0]] + wrong, own


class FirstReplayer:
    """A candidate that takes the last of equal experts, and can replay choices."""

    def __init__(self, can_replay=True, wrong=0.0, own=None):
        self.can_replay, self.wrong, self.own = can_replay, wrong, own

    def replay(self, inputs):
        expected, choices = TorchRunner(lambda t: moe(t)[:1], ["y"]).run_watched(inputs)
        if not self.can_replay:
            return Replay(expected, None, choices)
        tensors = {"x": torch.from_numpy(np.array(inputs["x"]))}
        replay, own = moe(tensors, torch.from_numpy(choices[0].ids), False, self.wrong)
        own = own.numpy() if self.own is None else self.own(own.numpy())
        return Replay(expected, {"y": replay.numpy()}, choices, (own,))


def run(replayer, wrong=0.0, **options):
    reference = TorchRunner(lambda t: moe(t)[:1], ["y"])
    candidate = TorchRunner(lambda t: moe(t, None, False, wrong)[:1], ["y"], "candidate")
    return compare(reference, candidate, inputs(), replayer=replayer, **options)


def test_a_tie_that_falls_the_other_way_is_no_difference():
    assert run(None).exit_code == 1
    report = run(FirstReplayer())
    assert report.exit_code == 0, str(report)
    assert [row.output for row in report.rows] == ["y", "choice 0"]
    assert report.flips == 6  # all of `zeros`


def test_a_difference_that_remains_under_the_same_choices_is_one():
    report = run(FirstReplayer(wrong=0.01), wrong=0.01)
    assert report.exit_code == 1
    assert not next(row for row in report.rows if row.output == "y").equal


def test_a_choice_outside_its_margin_fails_even_if_the_replayed_outputs_agree():
    worst = lambda t: (t["x"] + EXPERTS[t["x"].argmin(-1)],)  # noqa: E731
    candidate = TorchRunner(worst, ["y"], "candidate")
    replayer = FirstReplayer(own=lambda own: (own + 1) % 4)
    report = compare(TorchRunner(lambda t: moe(t)[:1], ["y"]), candidate, inputs(), replayer=replayer)
    assert report.exit_code == 1
    by_name = {row.output: row for row in report.rows}
    assert "no tie" in by_name["choice 0"].reason


def test_without_replay_a_case_of_ties_is_undecided():
    report = run(FirstReplayer(can_replay=False))
    assert report.exit_code == 0, str(report)
    assert report.warnings == (f"output 'y' is undecided at zeros: {NO_REPLAY}",)


def test_what_is_a_tie():
    def tied(scores, k=1, rtol=0.0):
        array = np.array(scores, np.float32)
        return Choice(np.zeros((*array.shape[:-1], k), np.int64), array).is_tied(Margin(rtol, 0))

    assert tied([[1, 1, 0]])
    assert not tied([[1, 0.9, 0]])
    assert tied([[1, 0.9, 0]], rtol=0.2)
    assert tied([[1, 0.9, 0], [3, 2, 2]], k=2)
    assert not tied([[1, 2]], k=2)
    assert tied([[-np.inf, -np.inf, 1]], k=2)


def gate(flipped):
    """Expert 0 or 1, which score the same; `flipped` tokens take 1."""

    def call(tensors):
        n = len(tensors["x"])
        ids = torch.zeros(n, 1, dtype=torch.int64)
        ids[:flipped] = 1
        return ids, torch.tensor([[0.5, 0.5]]).expand(n, 2)

    return TorchRunner(call, ["idx", "scores"])


@pytest.mark.parametrize(
    ("budget", "code"), [(None, 0), ("100%", 0), ("20%", 0), ("5%", 1), ("0%", 1), ("3", 1), ("1000", 0)]
)
def test_a_budget_of_flips(budget, code):
    pair = RoutingPair("idx", None, "scores")
    limit = None if budget is None else FlipBudget.parse(budget)
    report = compare(gate(0), gate(1), inputs(), routing=[pair], budget=limit)
    assert report.exit_code == code  # a token in most cases
    if code:
        assert report.rows[0].reason == f"10 of 74 tokens went to another expert in a tie, more than {limit}"


def float64(call):
    return TorchRunner(call, ["y"], "torch-float64", "float64")


def test_the_report_says_if_the_reference_is_as_far_off():
    def reference(tensors):
        return tensors["x"] + 3e-3

    report = compare(
        TorchRunner(reference, ["y"]),
        TorchRunner(lambda t: t["x"], ["y"], "candidate"),
        inputs(),
        truth=float64(lambda t: t["x"]),
        tolerance=Tolerance(1e-5, 1e-5),
    )
    assert report.exit_code == 1
    assert "torch itself is 3.0e-03 from a float64 run, candidate 0.0e+00" in "\n".join(report.warnings)


def cancelling(tensors, scale=3e6):
    """Loses digits at large values."""
    x = tensors["x"]
    return torch.where(x.abs() > 12, (x + scale) - scale, x)


def test_digits_that_the_reference_loses_too_are_no_difference():
    other = TorchRunner(lambda t: cancelling(t, 2.9e6), ["y"])
    reference = TorchRunner(cancelling, ["y"])
    assert compare(reference, other, inputs()).exit_code == 0  # undecided without a float64 run
    report = compare(reference, other, inputs(), truth=float64(cancelling))
    assert report.exit_code == 0, str(report)
    assert report.warnings == ()
    wrong = TorchRunner(lambda t: cancelling(t) * torch.where(t["x"].abs() > 12, 1.5, 1.0), ["y"])
    assert compare(reference, wrong, inputs(), truth=float64(cancelling)).exit_code == 1


def overflowing(tensors):
    x = tensors["x"]
    return torch.where(x > 1e30, x * 16, x)


@pytest.mark.parametrize(("value", "code"), [(float("inf"), 0), (float("nan"), 0), (1.0, 1)])
def test_where_the_reference_overflows_the_candidate_must_too(value, code):
    def candidate(tensors):
        y = overflowing(tensors)
        return torch.where(torch.isinf(y), value, y)

    report = compare(
        TorchRunner(overflowing, ["y"]),
        TorchRunner(candidate, ["y"]),
        inputs(thorough=True),
        truth=float64(overflowing),
    )
    assert report.exit_code == code, str(report)


def test_a_float64_run_makes_float64_of_what_the_model_makes_and_casts():
    def call(tensors):
        made = torch.zeros(4) + torch.ones(4, dtype=torch.float32)
        return (tensors["x"].float() + made).to(torch.float32) / 3

    x = np.array([[1.0, 2, 3, 4]], np.float32)
    found = float64(call).run({"x": x})["y"]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, (x.astype(np.float64) + 1) / 3)
    assert torch.get_default_dtype() == torch.float32


def test_zero_tokens_are_compared_and_prove_nothing():
    spec, dims = [TensorSpec("x", "float32", ("n", 4))], [DimRange("n", 3)]
    x = {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}
    same, broken = (
        TorchRunner(lambda t: t["x"] * 2, ["y"]),
        TorchRunner(lambda t: t["x"].reshape(len(t["x"]), -1) * 2, ["y"]),  # -1 of nothing
    )
    assert compare(same, same, cases(spec, dims, x, at=[{"n": 0}])).exit_code == 0
    report = compare(same, broken, cases(spec, dims, x, at=[{"n": 0}]))
    assert [case.label for case in report.cases if case.outcome == "failed"] == ["n=0"]
    empty = compare(
        same, same, cases([TensorSpec("x", "float32", (0, 4))], [], {"x": np.zeros((0, 4), np.float32)})
    )
    assert (empty.verdict, empty.shortfall) == ("not proven", "y: empty or undecided in every case")


GRAIN = 1e-3
"""What scores are off by where they come from float16 values."""


def rounded_choice(times=1.0, *, best=True, tokens=4000):
    """Scores that both engines have with errors of one size, the candidate's `times` as large; and the truth."""
    draw = np.random.default_rng(3)
    true = draw.uniform(0.1, 0.9, (tokens, 4))
    signs = draw.choice([-1.0, 1.0], (2, tokens, 4))
    scores, ours = ((true + GRAIN * size * sign) for size, sign in zip((1.0, times), signs, strict=True))
    ids, own = (array.argmax(-1)[:, None] for array in (scores, ours))
    if not best:
        own[7] = ours[7].argmin()
    choice = Choice(ids, scores.astype(np.float32))
    replay = Replay({}, {}, (choice,), (own,), (ours.astype(np.float32),))
    return replay, (true,)


def test_a_choice_by_scores_that_are_as_near_to_float64_is_a_flip():
    replay, true = rounded_choice()
    (alone,) = judge_choices(replay, Tolerance())
    assert not alone.ok
    (judged,) = judge_choices(replay, Tolerance(), truth=true)
    assert judged.ok
    moved = int((replay.own[0] != replay.choices[0].ids).sum())
    assert judged.flips == moved > 5


@pytest.mark.parametrize(("times", "ok"), [(0.0, True), (7.9, True), (8.1, False), (30.0, False)])
def test_scores_may_be_off_as_far_as_outputs_may(times, ok):
    replay, true = rounded_choice(times)
    (judged,) = judge_choices(replay, Tolerance(), truth=true)
    assert judged.ok == ok


def test_one_token_that_takes_less_than_the_best_of_its_own_scores_is_wrong():
    replay, true = rounded_choice(best=False)
    (judged,) = judge_choices(replay, Tolerance(), truth=true)
    assert not judged.ok


@pytest.mark.parametrize(
    ("tolerance", "truths"),
    [(Tolerance(rtol=1e-5, atol=1e-6), 1), (Tolerance(), 0), (Tolerance(), 2)],
    ids=["a tolerance by hand", "no scores in float64", "scores of other choices"],
)
def test_what_excuses_no_choice(tolerance, truths):
    replay, true = rounded_choice()
    (judged,) = judge_choices(replay, tolerance, truth=true * truths)
    assert not judged.ok


def test_scores_of_one_token_do_not_excuse_another():
    """A token whose scores are off by much, in both engines alike, gives others no room."""
    replay, (true,) = rounded_choice(0.0)
    scores, own = replay.choices[0].scores.copy(), replay.own[0].copy()
    scores[0] = true[0] + [0.3, -0.3, 0.3, -0.3]
    far = int(np.argmax(np.sort(true[1:], -1)[:, -1] - np.sort(true[1:], -1)[:, -2])) + 1
    own[far] = true[far].argsort()[-2]  # its second best, by far
    changed = Replay({}, {}, (Choice(replay.choices[0].ids, scores),), (own,), replay.scores)
    (judged,) = judge_choices(changed, Tolerance(), truth=(true,))
    assert not judged.ok
