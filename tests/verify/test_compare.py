"""Whole comparisons: what is equal, what is refused, when the loop stops."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_export.errors import MissingBackendError, UsageError
from moe_export.verify import (
    DimRange,
    Margin,
    RoutingPair,
    TensorSpec,
    Tolerance,
    TorchRunner,
    cases,
    compare,
)
from moe_export.verify.inputs.cases import MadeOnce
from moe_export.verify.reports.report import worst_code
from moe_export.verify.reports.table import plain as as_text

LINEAR = "g (float[batch,sequence,4] x) => (float[batch,sequence,3] y) { h = MatMul(x, w) y = Tanh(h) }"
SPECS = [TensorSpec("x", "float32", ("batch", "sequence", 4))]
DIMS = [DimRange("batch", 2), DimRange("sequence", 10)]
W = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def linear(tensors):
    return torch.tanh(tensors["x"] @ torch.from_numpy(W))


def inputs(seed=0, dims=DIMS):
    x = np.random.default_rng(seed).normal(size=(2, 10, 4)).astype(np.float32)
    return cases(SPECS, dims, {"x": x}, seed)


def torch_runner(call=linear):
    return TorchRunner(call, ["y"])


@pytest.mark.parametrize("seed", range(20))
def test_a_right_graph_is_equal_at_every_size(graph, seed):
    report = compare(torch_runner(), graph(LINEAR, w=W), inputs(seed))
    assert (report.verdict, report.exit_code) == ("equal", 0)
    assert len(report.compared) == len(report.cases) > 10
    assert report.warnings == ()


@pytest.mark.parametrize("seed", range(20))
def test_a_right_gate_is_equal_over_many_seeds_and_sizes(graph, seed):
    w = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    candidate = graph(
        """g (float[batch,sequence,4] x) => (int64[tokens,3] idx, float[tokens,3] weight) {
             h = MatMul(x, w)  flat = Reshape(h, to)  scores = Softmax<axis=-1>(flat)
             top, idx = TopK<axis=-1, sorted=0>(scores, k)
             total = ReduceSum<keepdims=1>(top, last)  weight = Div(top, total) }""",
        w=w,
        to=np.array([-1, 8]),
        k=np.array([3]),
        last=np.array([-1]),
    )

    def gate(tensors):
        scores = (tensors["x"] @ torch.from_numpy(w)).reshape(-1, 8).softmax(-1)
        top, idx = torch.topk(scores, 3, dim=-1, sorted=False)
        return idx.flip(-1), (top / top.sum(-1, keepdim=True)).flip(-1), scores

    reference = TorchRunner(gate, ["idx", "weight", "scores"])
    pair = RoutingPair("idx", "weight", "scores")
    report = compare(reference, candidate, inputs(seed), routing=[pair])
    assert report.exit_code == 0, str(report)
    assert [row.output for row in report.rows] == ["idx", "weight"]  # scores are the reference's own
    assert compare(reference, candidate, inputs(seed)).exit_code == 1  # as plain tensors the order differs


def test_a_score_output_that_both_have_is_judged():
    def run(offset):
        def call(tensors):
            scores = tensors["x"].reshape(-1, 4).softmax(-1)
            return scores.topk(2).indices, scores + offset

        return TorchRunner(call, ["idx", "scores"])

    pair = RoutingPair("idx", None, "scores")
    assert compare(run(0), run(0), inputs(), routing=[pair]).exit_code == 0
    report = compare(run(0), run(1e-3), inputs(), routing=[pair])
    assert [row.equal for row in report.rows] == [True, False]


def test_flips_in_a_tie_are_in_the_report():
    def gate(order):
        def call(tensors):
            scores = torch.ones(tensors["x"].shape[0], 4)
            return torch.tensor(order).expand(len(scores), 2), scores

        return TorchRunner(call, ["idx", "scores"])

    pair = RoutingPair("idx", None, "scores")
    report = compare(gate([0, 1]), gate([2, 1]), inputs(), routing=[pair])
    assert report.exit_code == 0
    assert report.flips == sum(dict(case.sizes)["batch"] for case in report.cases)
    assert f"{report.flips} tied tokens routed to an equally scored expert" in str(report)


def needs(condition, message):
    def call(tensors):
        if not condition(tensors["x"].shape[1]):
            raise ValueError(f"{message}\nwith a second line")
        return linear(tensors)

    return torch_runner(call)


def test_sizes_that_the_reference_refuses_are_recorded_and_not_failed(graph):
    report = compare(needs(lambda n: n > 1, "too short"), graph(LINEAR, w=W), inputs())
    assert report.exit_code == 0
    refused = [case for case in report.cases if case.outcome == "refused"]
    assert {dict(case.sizes)["sequence"] for case in refused} == {1}
    assert {case.reason for case in refused} == {"ValueError: too short"}
    assert "refused by torch, batch=1 sequence=1; batch=2 sequence=1: ValueError: too short" in str(report)


def test_messages_that_differ_in_numbers_are_one_line(graph):
    def call(tensors):
        length = tensors["x"].shape[1]
        if length > 2:
            raise ValueError(f"{length} steps are more than 2" if length % 2 else f"odd: {length}")
        return linear(tensors)

    report = compare(torch_runner(call), graph(LINEAR, w=W), inputs())
    refused = {dict(case.sizes)["sequence"] for case in report.cases if case.outcome == "refused"}
    assert len(refused) > 4
    lines = " ".join(str(report).split()).split("refused by torch, ")[1:]
    assert len(lines) == 2
    assert sum(" steps are more than 2 (likewise with other numbers)" in line for line in lines) == 1
    assert sum("odd: " in line and "(likewise with other numbers)" in line for line in lines) == 1


def test_of_many_sizes_that_are_refused_alike_a_few_are_named(graph):
    report = compare(needs(lambda n: n == 5, "five only"), graph(LINEAR, w=W), inputs())
    refused = [case.label for case in report.cases if case.outcome == "refused"]
    assert len(refused) > 6
    (line,) = [
        part for part in as_text(report).replace("\n  ", " ").splitlines() if part.startswith("refused")
    ]
    assert line.endswith(f"; and {len(refused) - 5} more: ValueError: five only")
    assert line.count(";") == 5
    assert all(label in as_text(report, verbose=True).replace("\n  ", " ") for label in refused)


def test_a_model_of_whole_chunks_falls_back_on_the_reserve(graph):
    dims = [DimRange("batch", 2, 2, 2), DimRange("sequence", 10)]
    report = compare(needs(lambda n: n % 10 == 0, "whole chunks"), graph(LINEAR, w=W), inputs(dims=dims))
    plain = [case for case in report.compared if case.regime == "normal"]
    assert [dict(case.sizes)["sequence"] for case in plain] == [10, 10, 20, 30, 40]
    assert report.exit_code == 0


def test_too_few_sizes_prove_nothing(graph):
    report = compare(
        needs(lambda n: n == 10, "only ten"), graph(LINEAR, w=W), inputs(dims=[DIMS[0], DIMS[1]])
    )
    assert report.verdict == "equal"  # the batch still varies
    fixed = [DimRange("batch", 2, 2, 2), DIMS[1]]
    report = compare(needs(lambda n: n == 10, "only ten"), graph(LINEAR, w=W), inputs(dims=fixed))
    assert (report.verdict, report.exit_code) == ("not proven", 1)
    assert report.shortfall == "1 of 4 sizes could be compared"
    assert str(report).startswith(
        "onnxruntime-cpu against torch: not proven (1 of 4 sizes could be compared)"
    )


def test_a_range_with_fewer_sizes_needs_only_those(graph):
    dims = [DimRange("batch", 2, 2, 2), DimRange("sequence", 10, 10, 11)]
    report = compare(torch_runner(), graph(LINEAR, w=W), inputs(dims=dims))
    assert {dict(case.sizes)["sequence"] for case in report.compared} == {10, 11}
    assert report.exit_code == 0


def test_nothing_dynamic_needs_no_other_size(graph):
    spec = TensorSpec("x", "float32", (2, 10, 4))
    x = np.random.default_rng(0).normal(size=(2, 10, 4)).astype(np.float32)
    report = compare(torch_runner(), graph(LINEAR, w=W), cases([spec], [], {"x": x}))
    assert [case.label for case in report.compared][:2] == ["example", "new values"]
    assert {case.sizes for case in report.cases} == {()}
    assert report.exit_code == 0


def test_no_cases_and_no_outputs_prove_nothing():
    assert compare(torch_runner(), torch_runner(), []).verdict == "not proven"
    silent = TorchRunner(lambda t: (), [])
    assert compare(silent, silent, inputs()).shortfall == "there are no outputs to compare"


def test_a_size_that_only_the_candidate_refuses_is_a_failure(graph):
    candidate = graph(LINEAR.replace("sequence,4", "10,4").replace("sequence,3", "10,3"), w=W)
    report = compare(torch_runner(), candidate, inputs())
    assert report.exit_code == 1
    failed = [case for case in report.cases if case.outcome == "failed"]
    assert {dict(case.sizes)["sequence"] for case in failed} == {1, 5, 9, 15, 20, 30}
    assert failed[0].reason.startswith("UsageError: input 'x' is float32[1, 1, 4]; the graph takes")
    (line,) = " ".join(str(report).split()).split("FAILED in onnxruntime-cpu only, ")[1:]
    assert "batch=1 sequence=1" in line
    assert ": UsageError: input 'x' is float32[1, 1, 4]; the graph takes x: float32[batch, 10, 4]" in line


def test_models_with_different_inputs_are_wrong_use(graph):
    with pytest.raises(UsageError, match="input 'z' is missing; unexpected input 'x'"):
        compare(torch_runner(), graph("g (float[4] z) => (float[4] y) { y = Neg(z) }"), inputs())


def test_a_lost_device_is_no_failure_of_a_size():
    class Lost:
        name = "gpu"

        def run(self, inputs):
            raise MissingBackendError("the device is gone")

    with pytest.raises(MissingBackendError):
        compare(torch_runner(), Lost(), inputs())


def test_no_clock_decides_which_cases_there_are():
    slow = torch_runner(lambda t: (time.sleep(0.02), linear(t))[1])
    quick, late = (compare(runner, runner, inputs()) for runner in (torch_runner(), slow))
    assert [case.label for case in quick.cases] == [case.label for case in late.cases]
    assert quick.exit_code == late.exit_code == 0


def test_what_a_time_limit_cuts_off_is_said_and_is_not_equal():
    whole = compare(torch_runner(), torch_runner(), inputs())
    report = compare(torch_runner(), torch_runner(), inputs(), time_limit=0)
    assert [case.label for case in report.cases] == ["example"]
    assert list(report.left_out) == [case.label for case in whole.cases[1:]]
    assert (report.verdict, report.exit_code) == ("unfinished", 5)
    assert report.shortfall.startswith(
        f"1 of {len(whole.cases)} cases compared, not compared: new values; batch=1"
    )
    assert "NOT COMPARED, the time limit was reached: new values; batch=1 sequence=1;" in str(report)
    assert compare(torch_runner(), torch_runner(), inputs(), time_limit=600).verdict == "equal"


def test_a_difference_counts_where_the_time_was_up_all_the_same():
    off = torch_runner(lambda t: linear(t) + 1)
    report = compare(torch_runner(), off, inputs(), time_limit=0)
    assert (report.verdict, report.exit_code) == ("not equal", 1)
    unfinished = compare(torch_runner(), torch_runner(), inputs(), time_limit=0)
    assert worst_code([unfinished, report]) == 1
    assert worst_code([unfinished, compare(torch_runner(), torch_runner(), inputs())]) == 5


def test_the_arrays_of_cases_that_are_not_run_are_never_made():
    looked = []

    def counted():
        for case in inputs():
            yield replace(
                case, inputs=MadeOnce({"x": lambda case=case: looked.append(case) or case.inputs["x"]})
            )

    compare(torch_runner(), torch_runner(), counted(), time_limit=0)
    assert [case.label for case in looked] == ["example"]


def test_progress_is_told_of_each_case():
    seen = []
    report = compare(torch_runner(), torch_runner(), inputs(), progress=seen.append)
    assert tuple(seen) == report.cases


def test_tolerances_reach_the_outputs():
    off = torch_runner(lambda t: linear(t) + 1e-4)
    assert compare(torch_runner(), off, inputs()).exit_code == 1
    assert compare(torch_runner(), off, inputs(), tolerance=Tolerance(atol=1e-3)).exit_code == 0
    own = Tolerance(outputs={"y": Margin(0, 1e-3)})
    assert compare(torch_runner(), off, inputs(), tolerance=own).exit_code == 0
    assert (
        compare(torch_runner(), off, inputs(), tolerance=Tolerance(outputs={"z": Margin(1, 1)})).exit_code
        == 1
    )


def test_a_reference_that_is_nan_proves_nothing():
    nan = torch_runner(lambda t: linear(t) * float("nan"))
    report = compare(nan, nan, inputs())
    assert (report.verdict, report.exit_code) == ("not proven", 1)
    assert report.shortfall == "y: NaN throughout in every case"
    assert (
        "warning: output 'y' of torch is NaN throughout at example; new values; batch=1 sequence=1 and"
        in str(report)
    )


def test_a_reference_that_is_nan_at_one_size_is_a_warning():
    nan = torch_runner(
        lambda t: linear(t) * (float("nan") if t["x"].shape[1] == 15 and len(t["x"]) == 2 else 1)
    )
    report = compare(nan, nan, inputs())
    assert report.exit_code == 0
    assert report.warnings == ("output 'y' of torch is NaN throughout at batch=2 sequence=15",)


def test_a_routing_of_unknown_outputs_is_wrong_use():
    with pytest.raises(UsageError, match="routing names the output 'idx', but the reference has: y"):
        compare(torch_runner(), torch_runner(), inputs(), routing=[RoutingPair("idx")])
