"""Beyond the tolerance, PyTorch's own error says how much may be asked."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_export.verify import (
    Case,
    DimRange,
    Margin,
    TensorSpec,
    Tolerance,
    TorchRunner,
    cases,
    compare,
    judge,
)
from moe_export.verify.judging.error_model import ANOTHER_WAY, TIMES, may_stand, stand
from moe_export.verify.judging.replay import Choice, Replay
from moe_export.verify.reports.page import page
from moe_export.verify.reports.reading import judge_again, read_report
from moe_export.verify.reports.table import errors

MARGIN = Margin(1e-5, 1e-5)
GENERATOR = np.random.default_rng(0)
TRUE = GENERATOR.standard_normal((20, 64))
NOISE = 2e-5 * GENERATOR.standard_normal((20, 64))
OTHER = 2e-5 * GENERATOR.standard_normal((20, 64))
"""Errors of two right programs, well beyond the tolerance."""


def stood(reference, candidate, true=TRUE, nearby=()):
    reference, candidate = (np.asarray(array, np.float32) for array in (reference, candidate))
    found = judge("y", reference, candidate, MARGIN)
    assert not found.ok
    return stand(found, reference, candidate, true, [{"y": near.astype(np.float32)} for near in nearby])


def test_two_right_programs_are_equal():
    found = stood(TRUE + NOISE, TRUE + OTHER)
    assert found.ok
    assert 0 < found.standing.ratio < TIMES / 2
    assert found.standing.own < 1e-4
    assert found.standing.beyond > 100


@pytest.mark.parametrize("place", [(0, 0), (7, 63), (19, 5)])
def test_one_element_off_by_a_thousandth(place):
    wrong = TRUE + OTHER
    wrong[place] += 1e-3
    found = stood(TRUE + NOISE, wrong)
    assert not found.ok
    assert found.standing.ratio > TIMES


def test_what_one_row_loses_excuses_no_other():
    reference, candidate = TRUE + 1e-7 * NOISE, TRUE.copy()
    reference[3] += 1e-3
    candidate[4, 4] += 1e-4
    assert not stood(reference, candidate).ok
    candidate = TRUE.copy()
    candidate[3, 4] += 1e-3
    assert stood(reference, candidate).ok


def test_a_lucky_row_has_the_room_of_the_others():
    reference = TRUE + NOISE
    reference[5] = TRUE[5]
    assert stood(reference, TRUE + OTHER).ok


def test_a_lucky_run_has_the_room_of_the_runs_beside_it():
    candidate = TRUE + OTHER
    assert not stood(TRUE + 1e-3 * NOISE, candidate).ok
    assert stood(TRUE + 1e-3 * NOISE, candidate, nearby=[TRUE + NOISE]).ok


def test_a_float64_run_that_took_another_way_excuses_nothing():
    true = TRUE.copy()
    true[2] += 1
    candidate = TRUE + NOISE
    candidate[2] += 0.5
    assert not stood(TRUE + NOISE, candidate, true).ok


@pytest.mark.parametrize(("factor", "says"), [(0.99, False), (1.01, True)])
def test_where_the_reference_is_too_far_off_its_error_is_told_and_is_no_zero(factor, says):
    off = factor * ANOTHER_WAY * float(np.abs(TRUE).max())
    reference, candidate = TRUE.copy(), TRUE.copy()
    reference[4, 0] += off
    candidate[4, 0] -= 9 * off
    found = stood(reference, candidate)
    assert not found.ok
    if says:
        assert found.standing.another_way == pytest.approx(off, rel=1e-3)
        assert errors(found.standing)[1:] == (f"{off:.2e}!", "-")
    else:
        assert found.standing.another_way is None
        assert found.standing.theirs == pytest.approx(off, rel=1e-3)


def test_nan_is_no_rounding():
    candidate = TRUE + OTHER
    candidate[0, 0] = np.nan
    assert not stood(TRUE + NOISE, candidate).ok


def cancelling(order):
    def call(tensors):
        x = tensors["x"]
        total = sum(100 * x[..., index] for index in order)
        return total[..., None] - 100 * x.sum(-1, keepdim=True) + x

    return call


def at_some_sizes(call, tolerance=None):
    spec = [TensorSpec("x", "float32", ("batch", 64))]
    example = {"x": np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)}
    return compare(
        TorchRunner(cancelling(list(range(64))), ["y"]),
        TorchRunner(call, ["y"], "other"),
        cases(spec, [DimRange("batch", 4)], example),
        truth=TorchRunner(cancelling(list(range(64))), ["y"], "torch-float64", "float64"),
        tolerance=tolerance,
    )


BACKWARDS = cancelling(list(range(63, -1, -1)))


def test_the_table_says_tolerance_errors_and_ratio():
    report = at_some_sizes(BACKWARDS)
    assert report.verdict == "equal"
    line = next(line for line in str(report).splitlines() if line.startswith("by float64"))
    assert line.split() == ["by", "float64", "tolerance", "own", "error", "torch's", "ratio", "at"]
    assert "equal where an error is at most 8 times that of torch in the same row" in str(report)
    assert "By float64" in page([report])
    assert max(len(line) for line in str(report).splitlines()) <= 100


def test_what_cancels_entirely_is_told_as_such_in_the_table_and_on_the_page():
    report = at_some_sizes(lambda tensors: BACKWARDS(tensors) * (1 + 1e-3))
    assert "!: torch itself" not in str(report) + page([report])
    (label, judgement), *_ = report.by_float64
    far = replace(judgement, standing=replace(judgement.standing, theirs=0.0, another_way=0.5))
    case = next(case for case in report.cases if judgement in case.judgements)
    changed = replace(report, cases=[replace(case, judgements=[far])])
    assert list(changed.by_float64) == [(label, far)]
    for text in (str(changed), page([changed])):
        assert "5.00e-01!" in text
        assert "!: torch itself is more than 1% of the largest value off" in text


def test_a_tolerance_that_was_chosen_is_strict():
    for tolerance in (Tolerance(1e-5, None), Tolerance(None, 1e-5), Tolerance(outputs={"y": MARGIN})):
        assert at_some_sizes(BACKWARDS, tolerance).verdict == "not equal"


def test_the_same_with_an_error_planted_in_it():
    def wrong(tensors):
        y = BACKWARDS(tensors)
        y[..., 0, 3] *= 1.01
        return y

    assert at_some_sizes(wrong).verdict == "not equal"


def test_a_report_is_read_back_and_other_tolerances_are_strict():
    report = at_some_sizes(BACKWARDS)
    again = read_report(report.to_json())
    assert again.by_float64 == report.by_float64
    assert judge_again(again, Tolerance()).verdict == "equal"
    assert judge_again(again, Tolerance(1e-6, None)).verdict == "not equal"
    assert judge_again(again, Tolerance(1e-1, 1e-1)).verdict == "equal"
    document = json.loads(report.to_json())
    for case in document["cases"]:
        for judgement in case["judgements"]:
            del judgement["standing"]  # as reports were written before
    assert read_report(json.dumps(document)).by_float64 == ()


def gate(tensors):
    scores = tensors["x"] @ torch.linspace(-1, 1, 64, dtype=tensors["x"].dtype).reshape(8, 8).T
    weights, ids = scores.topk(2, dim=-1)
    return weights, ids


def test_a_run_under_choices_that_were_made_before():
    runner = TorchRunner(gate, ["w", "ids"])
    x = {"x": np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)}
    outputs, (choice,) = runner.run_watched(x)
    other = Choice(choice.ids[:, ::-1].copy(), choice.scores)
    told = runner.run_under(x, [other])
    assert np.array_equal(told["ids"], other.ids)
    assert np.allclose(told["w"], outputs["w"][:, ::-1])
    assert runner.run_under(x, [choice, choice]) is None
    assert runner.run_under(x, [Choice(choice.ids[:3], choice.scores[:3])]) is None


def test_float64_is_told_what_the_model_chose():
    """Else a tie that float64 breaks the other way would excuse whatever stands in that row."""

    class Replayer:
        def replay(self, inputs):
            outputs, choices = TorchRunner(block, ["y"]).run_watched(inputs)
            return Replay(outputs, TorchRunner(wrong, ["y"]).run(inputs), choices, (choices[0].ids,))

    def block(tensors):
        x = tensors["x"]
        scores = torch.stack([x[:, 0], x[:, 0] + 1e-12 * x[:, 0].to(x.dtype).sign()], -1)
        ids = scores.topk(1).indices
        return torch.where(ids == 0, x, 3 * x)

    def wrong(tensors):
        return block(tensors) * 1.2

    x = {"x": GENERATOR.standard_normal((4, 64), np.float32)}
    report = compare(
        TorchRunner(block, ["y"]),
        TorchRunner(wrong, ["y"], "other"),
        [Case("example", 0, {}, x)],
        truth=TorchRunner(block, ["y"], "torch-float64", "float64"),
        replayer=Replayer(),
    )
    assert report.verdict == "not equal"
    (judgement,) = report.cases[0].judgements
    assert judgement.reference_off == 0


def test_grouped_products_in_float64():
    rows, stack = torch.randn(6, 16), torch.randn(3, 16, 8)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)

    def call(tensors):
        return torch.nn.functional.grouped_mm(tensors["x"], stack.to(tensors["x"].dtype), offs=ends)[:5]

    wide = TorchRunner(call, ["y"], "torch-float64", "float64").run({"x": rows.numpy()})["y"]
    groups = [rows[:2] @ stack[0], rows[2:5] @ stack[2]]
    assert wide.dtype == np.float64
    assert np.allclose(wide, torch.cat(groups).numpy(), atol=1e-5)


def drift(total=torch.cumsum):
    """A running sum against what it would be on average: large sums cancel, with all that was lost on the way."""

    def call(tensors):
        x = tensors["x"].abs()
        steps = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
        return total(x, 1) - 0.8 * steps[:, None]

    return call


def one_by_one(x, dim):
    """A running sum in the dtype itself, as onnxruntime's CumSum adds up."""
    return torch.from_numpy(np.cumsum(x.numpy(), dim, dtype=x.numpy().dtype))


def at_a_long_length(candidate):
    spec = TensorSpec("x", "float32", ("batch", "sequence", 3))
    example = {"x": GENERATOR.standard_normal((2, 16, 3), np.float32)}
    return compare(
        TorchRunner(drift(), ["y"]),
        TorchRunner(candidate, ["y"], "candidate"),
        cases([spec], [DimRange("batch", 2), DimRange("sequence", 16)], example, at=[{"sequence": 4096}]),
        truth=TorchRunner(drift(), ["y"], "torch-float64", "float64"),
    )


def test_running_sums_need_not_be_kept_in_float64():
    report = at_a_long_length(drift(one_by_one))
    assert report.verdict == "equal"
    assert report.by_float64


@pytest.mark.parametrize("share", [1.0001, 0.9999])
def test_running_sums_with_an_error_planted_in_them(share):
    def wrong(tensors):
        y = drift(one_by_one)(tensors)
        y[:, -1:] += (share - 1) * 4096
        return y

    assert at_a_long_length(wrong).verdict == "not equal"


def test_plain_accumulation_is_that_of_a_program_that_adds_one_by_one():
    x = torch.rand(2, 4096, 3, generator=torch.Generator().manual_seed(0))
    run = TorchRunner(lambda tensors: tensors["x"].cumsum(1), ["y"])
    found = run.run_under({"x": x.numpy()}, ())["y"]
    assert np.array_equal(found, one_by_one(x, 1).numpy())
    assert not np.array_equal(found, run.run({"x": x.numpy()})["y"])
    product = TorchRunner(lambda tensors: (0.5 + tensors["x"]).cumprod(-2), ["y"])
    terms = 0.5 + x.numpy()
    assert np.array_equal(
        product.run_under({"x": x.numpy()}, ())["y"], np.cumprod(terms, 1, dtype=np.float32)
    )


def test_what_ids_look_up_is_changed_by_one_rounding():
    """For a model of ids there are no inputs that differ in the last digit; without this, one lucky row refuses it."""
    table = torch.nn.Embedding(9, 64)
    run = TorchRunner(lambda tensors: table(tensors["ids"]), ["y"])
    ids = {"ids": np.arange(9)}
    plain, first, again, other = (
        run.run_under(ids, (), rounded)["y"] for rounded in (None, (1, 0.0), (1, 0.0), (2, 0.0))
    )
    assert np.array_equal(plain, run.run(ids)["y"])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    off = np.abs(first - plain) / np.abs(plain)
    assert 0 < off.max() <= 2 * np.finfo(np.float32).eps
    coarse = run.run_under(ids, (), (1, 2.0**-8))["y"]
    assert 2.0**-9 < (np.abs(coarse - plain) / np.abs(plain)).max() < 2.0**-7


class _Ids:
    """A reference of ids that is exact in one run, and off by as much as others in those beside it."""

    name = "reference"

    def __init__(self) -> None:
        self.asked: list = []

    def run(self, inputs):
        return {"y": np.ones((3, 4), np.float32) * inputs["ids"].shape[0]}

    def run_under(self, inputs, choices, rounded=None):
        self.asked.append(rounded)
        found = self.run(inputs)
        found["y"] += np.float32(4e-5 if rounded is not None else 0)
        return found


@pytest.mark.parametrize(("off", "verdict"), [(7.5, "equal"), (8.5, "not equal")])
def test_a_lucky_run_of_ids_refuses_nothing(off, verdict):
    class Candidate(_Ids):
        def run(self, inputs):
            return {"y": super().run(inputs)["y"] + np.float32(off * 4e-5)}

    class Truth(_Ids):
        def run(self, inputs):
            return {"y": super().run(inputs)["y"].astype(np.float64)}

        def run_under(self, inputs, choices, rounded=None):
            return self.run(inputs)

    reference = _Ids()
    case = Case("example", 0, {}, {"ids": np.arange(9)})
    assert compare(reference, Candidate(), [case], truth=Truth()).verdict == verdict
    assert len({seed for seed, _ in reference.asked}) == 4


LARGEST = float(np.abs(TRUE).max())


@pytest.mark.parametrize("share", [0.5, 0.98, 1.01, 4.0])
@pytest.mark.parametrize("own", [0.0, 0.3, 0.99, 1.01, 5.0])
def test_what_no_further_run_can_excuse_is_not_asked_of_any(share, own):
    """Errors about the largest that PyTorch's own may be, 1 % of the largest value, and 8 times that."""
    reference = TRUE.astype(np.float32)
    candidate = reference.copy()
    candidate[3, 5] += share * TIMES * ANOTHER_WAY * LARGEST
    near = TRUE.copy()
    near[3] += own * ANOTHER_WAY * LARGEST
    found = judge("y", reference, candidate, MARGIN)
    asked = may_stand(found, reference, candidate, TRUE)
    assert asked == (share < 1)
    equal = stand(found, reference, candidate, TRUE, [{"y": near.astype(np.float32)}]).ok
    assert equal == (share < own < 1)
    assert asked or not equal


class Counting:
    """A reference that counts its runs."""

    def __init__(self, call):
        self.runner, self.runs = TorchRunner(call, ["y"]), 0
        self.name = "torch"

    def run(self, inputs):
        self.runs += 1
        return self.runner.run(inputs)


@pytest.mark.parametrize(("error", "more"), [(1.0, 0), (1e-2, 4)], ids=["hopeless", "close"])
def test_runs_of_the_reference(error, more):
    reference = Counting(cancelling(list(range(64))))
    spec = TensorSpec("x", "float32", ("batch", 64))
    example = {"x": GENERATOR.standard_normal((4, 64), np.float32)}
    (case, *_) = cases([spec], [DimRange("batch", 4)], example)
    truth = TorchRunner(cancelling(list(range(64))), ["y"], "torch-float64", "float64")
    wrong = TorchRunner(lambda tensors: BACKWARDS(tensors) + error, ["y"], "candidate")
    report = compare(reference, wrong, [case], truth=truth)
    assert report.verdict == "not equal"
    assert reference.runs == 1 + more
