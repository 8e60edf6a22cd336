"""Run two engines side by side, case by case, until enough sizes have been compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from moe_export.errors import MissingBackendError, UsageError
from moe_export.verify.inputs import Case
from moe_export.verify.judge import Judgement, judge
from moe_export.verify.report import CaseResult, Report
from moe_export.verify.routing import judge_routing
from moe_export.verify.runner import Runner, one_line
from moe_export.verify.specs import Array, RoutingPair
from moe_export.verify.tolerance import Tolerance

Outputs = Mapping[str, Array]


def compare(
    reference: Runner,
    candidate: Runner,
    cases: Iterable[Case],
    *,
    tolerance: Tolerance | None = None,
    routing: Sequence[RoutingPair] = (),
    other_sizes: int = 3,
    seconds: float = 20.0,
    progress: Callable[[CaseResult], None] | None = None,
) -> Report:
    """Compare `candidate` with `reference`.

    Args:
        reference: The side that is right by definition.
        candidate: The side in question.
        cases: Inputs, the example first; asked for one at a time, and no further than needed.
        tolerance: For floats; the dtypes' defaults if None.
        routing: Outputs that are expert ids, with their weights and scores. A score output that only the
            reference has is not missed in the candidate.
        other_sizes: How many sizes besides the first must have been compared for the verdict "equal"; where
            `cases` offers fewer, all of them.
        seconds: Once that many are done, go on with further cases until so much time has passed in all.
        progress: Called with each result as it comes.

    Returns:
        A report. A case that the reference refuses is recorded and proves nothing; one that only the
        candidate refuses is a failure.

    Raises:
        UsageError: In the first case an engine does not take the inputs at all, or `routing` names an output
            that the reference does not have.
        MissingBackendError: An engine has lost its device.
    """
    tolerance = tolerance or Tolerance()
    results: list[CaseResult] = []
    wanted = 1 + other_sizes
    start = time.perf_counter()
    for case in cases:
        enough = len({result.sizes for result in results if result.outcome != "refused"}) >= wanted
        if enough and (case.reserve or time.perf_counter() - start > seconds):
            break
        results.append(_run_case(reference, candidate, case, tolerance, routing, first=not results))
        if progress is not None:
            progress(results[-1])
    return Report(reference.name, candidate.name, tuple(results), wanted)


def _run_case(
    reference: Runner,
    candidate: Runner,
    case: Case,
    tolerance: Tolerance,
    routing: Sequence[RoutingPair],
    *,
    first: bool,
) -> CaseResult:
    expected = _run(reference, case, first)
    if isinstance(expected, str):
        return CaseResult.of(case, "refused", expected)
    _check_routing(routing, expected)
    got = _run(candidate, case, first)
    if isinstance(got, str):
        return CaseResult.of(case, "failed", got)
    return CaseResult.of(case, "compared", None, _judge_all(expected, got, tolerance, routing))


def _run(runner: Runner, case: Case, first: bool) -> Outputs | str:
    """The outputs, or in one line why there are none."""
    try:
        return runner.run(case.inputs)
    except MissingBackendError:
        raise
    except UsageError as error:
        # At another size a refusal is a finding; on the example it means that the two models take different
        # inputs, and nothing can be said about them.
        if first:
            raise
        return one_line(error)
    except Exception as error:  # whatever a model raises
        return one_line(error)


def _judge_all(
    expected: Outputs, got: Outputs, tolerance: Tolerance, routing: Sequence[RoutingPair]
) -> tuple[Judgement, ...]:
    judged = {row.output: row for pair in routing for row in judge_routing(pair, expected, got, tolerance)}
    only_reference = {pair.scores for pair in routing} - got.keys()
    for name in (*expected, *(name for name in got if name not in expected)):
        if name in judged or name in only_reference:
            continue
        array = expected.get(name, got.get(name))
        margin = tolerance.of(name, "float32" if array is None else array.dtype.name)
        judged[name] = judge(name, expected.get(name), got.get(name), margin)
    order = [*expected, *got]
    return tuple(sorted(judged.values(), key=lambda row: order.index(row.output)))


def _check_routing(routing: Sequence[RoutingPair], expected: Outputs) -> None:
    for pair in routing:
        for name in (pair.indices, pair.weights, pair.scores):
            if name is not None and name not in expected:
                has = ", ".join(expected)
                raise UsageError(f"routing names the output '{name}', but the reference has: {has}")
