"""Run two engines side by side over all cases of a plan.

The cases are fixed before anything runs (see `inputs/cases`), independently of how fast the machine is. A time limit
set by the user cuts the plan off; then the verdict is "unfinished", and the report names what was not compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moe_export.errors import DiedError, MissingBackendError, UsageError
from moe_export.verify.inputs.cases import Case
from moe_export.verify.inputs.regimes import STRESS, TIES, UNASKED
from moe_export.verify.judging.error_model import may_stand
from moe_export.verify.judging.judge import LOST, Judgement, form_mismatch, judge, lost_of, without
from moe_export.verify.judging.replay import NO_REPLAY, Choice, Replay, Replayer, has_ties, judge_choices
from moe_export.verify.judging.routing import judge_routing
from moe_export.verify.judging.tolerance import FlipBudget, Tolerance
from moe_export.verify.judging.truth import judge_rounded, last_digits, look_ups, weigh
from moe_export.verify.reports.findings import LEFT_TO_CPU, CaseResult
from moe_export.verify.reports.report import Report
from moe_export.verify.runner import NoMemoryError, Runner, one_line
from moe_export.verify.specs import Array, RoutingPair, is_float

Outputs = Mapping[str, Array]


def compare(  # noqa: PLR0913  each has a name and a default
    reference: Runner,
    candidate: Runner,
    cases: Iterable[Case],
    *,
    tolerance: Tolerance | None = None,
    routing: Sequence[RoutingPair] = (),
    other_sizes: int = 3,
    time_limit: float | None = None,
    progress: Callable[[CaseResult], None] | None = None,
    budget: FlipBudget | None = None,
    truth: Runner | None = None,
    replayer: Replayer | None = None,
    about: Mapping[str, str] | None = None,
    narrow: str = "float32",
    rounded: Runner | None = None,
) -> Report:
    """Compare `candidate` with `reference`.

    Args:
        reference: The engine that is right by definition.
        candidate: The engine under test.
        cases: Inputs, the example first; asked for one at a time. The reserve is only run where too few sizes
            could be compared.
        tolerance: For floats; the dtypes' defaults if None.
        routing: Outputs that are expert ids, with their weights and scores. A score output that only the
            reference has is not missed in the candidate.
        other_sizes: How many sizes besides the first must have been compared for the verdict "equal"; where
            `cases` offers fewer, all of them.
        time_limit: Start no further case after so many seconds; None for no limit. The first case always runs.
        progress: Called with each result as it comes.
        budget: How many tokens may go to another expert in a tie; any number if None.
        truth: The reference in float64, asked where the two differ (see `truth`).
        replayer: Runs a case that differs again under the reference's choices (see `judging/replay`).
        about: Facts for the report.
        narrow: The narrowest type that the candidate computes in: what it may lose at the limits of a type.
        rounded: The reference with weights of that type: how far they alone move an output (see `truth`).

    Returns:
        A report. A case that the reference refuses is recorded and proves nothing; one that only the
        candidate refuses is a failure.

    Raises:
        UsageError: In the first case an engine does not take the inputs at all, or `routing` names an output
            that the reference does not have.
        MissingBackendError: An engine has lost its device.
        DiedError: The model ended the process that it ran in.
    """
    judges = _Judges(tolerance or Tolerance(), routing, truth, replayer, reference, narrow, rounded)
    results: list[CaseResult] = []
    wanted = 1 + other_sizes
    left_out: list[str] = []
    start = time.monotonic()
    for case in cases:
        if (
            case.reserve
            and len({result.sizes for result in results if result.outcome in ("compared", "failed")})
            >= wanted
        ):
            break
        if results and time_limit is not None and time.monotonic() - start >= time_limit:
            left_out += [] if case.reserve else [case.label]
            continue
        results.append(_run_case(reference, candidate, case, judges, first=not results))
        if progress is not None:
            progress(results[-1])
    facts = dict(about or {})
    if left := getattr(candidate, "elsewhere", ""):
        facts[LEFT_TO_CPU] = left
    return Report(reference.name, candidate.name, tuple(results), wanted, budget, facts, tuple(left_out))


@dataclass(frozen=True)
class _Judges:
    """What is needed to judge a case."""

    tolerance: Tolerance
    routing: Sequence[RoutingPair]
    truth: Runner | None
    replayer: Replayer | None
    reference: Runner
    narrow: str
    rounded: Runner | None

    def judge(self, case: Case, expected: Outputs, got: Outputs) -> tuple[Judgement, ...]:
        """Judge the outputs; if they differ, with the same choices; if they still do, against a float64 run."""
        if case.regime in UNASKED:
            return self._judge_known(case, expected, got)
        return self._judge(case, expected, got)

    def _judge_known(self, case: Case, expected: Outputs, got: Outputs) -> tuple[Judgement, ...]:
        """Skip elements where the reference is NaN for values that the model need not support."""
        lost = {name: lost_of(array) for name, array in expected.items()}
        found = {
            name: without(array, lost[name]) if name in lost and lost[name].shape == array.shape else array
            for name, array in got.items()
        }
        known = {name: without(array, lost[name]) for name, array in expected.items()}
        judged = self._judge(case, known, found)
        return tuple(
            replace(row, undecided=f"{LOST} in {int(lost[row.output].sum())} of {row.total} elements")
            if row.ok and not row.undecided and row.output in lost and lost[row.output].any()
            else row
            for row in judged
        )

    def _judge(self, case: Case, expected: Outputs, got: Outputs) -> tuple[Judgement, ...]:
        judged = _judge_all(expected, got, self.tolerance, self.routing)
        if all(row.ok for row in judged):
            return judged
        replay = self._replay(case)
        choices = () if replay is None else replay.choices
        if replay is not None and replay.got is not None:
            stress = case.regime in STRESS
            moved = judge_choices(replay, self.tolerance, stress=stress)
            if not stress and not all(row.ok for row in moved):
                moved = judge_choices(replay, self.tolerance, truth=self._true_scores(case, choices))
            if moved:
                expected, got = replay.expected, replay.got
                judged = (*_judge_all(expected, got, self.tolerance, self.routing), *moved)
        elif replay is not None and case.regime in TIES and has_ties(replay, self.tolerance):
            judged = tuple(
                row if row.ok else replace(row, reason=None, undecided=NO_REPLAY) for row in judged
            )
        return self._weighed(case, self._with_room(case, judged, expected, got), expected, got, choices)

    def _with_room(
        self, case: Case, judged: tuple[Judgement, ...], expected: Outputs, got: Outputs
    ) -> tuple[Judgement, ...]:
        """Judge with room for the effect of rounding the weights."""
        wrong = {row.output for row in judged if not row.ok and row.kind == "float"}
        if self.rounded is None or not wrong:
            return judged
        moved = _run(self.rounded, case, first=False)
        if isinstance(moved, _Missing):
            return judged
        return tuple(
            judge_rounded(row, expected[row.output], got[row.output], moved.get(row.output), self.narrow)
            if row.output in wrong
            else row
            for row in judged
        )

    def _true_scores(self, case: Case, choices: Sequence[Choice]) -> Sequence[Array] | None:
        """The scores of these choices in float64; None if nothing can tell."""
        scores_under = getattr(self.truth, "scores_under", None)
        if scores_under is None:
            return None
        try:
            found: Sequence[Array] | None = scores_under(case.inputs, choices)
        except (DiedError, MissingBackendError):
            raise
        except Exception:  # whatever a model raises
            return None
        return found

    def _replay(self, case: Case) -> Replay | None:
        return None if self.replayer is None else self.replayer.replay(case.inputs)

    def _weighed(
        self,
        case: Case,
        judged: tuple[Judgement, ...],
        expected: Outputs,
        got: Outputs,
        choices: Sequence[Choice],
    ) -> tuple[Judgement, ...]:
        stress = case.regime in STRESS
        comparable = {
            row.output
            for row in judged
            if not row.ok
            and row.output in got
            and row.output in expected
            and form_mismatch(expected[row.output], got[row.output]) is None
        }
        if not comparable or (self.truth is None and not stress):
            return judged
        truth = None if self.truth is None else _under(self.truth, case, choices)
        nearby: tuple[Outputs, ...] = ()
        if truth is not None and any(
            stress or self._is_open(row, expected, got, truth) for row in judged if row.output in comparable
        ):
            nearby = self._nearby(case, choices)
        return tuple(
            weigh(
                row,
                expected[row.output],
                got[row.output],
                truth,
                stress=stress,
                nearby=nearby,
                strict=self.tolerance.is_by_hand(row.output),
            )
            if row.output in comparable
            else row
            for row in judged
        )

    def _is_open(self, row: Judgement, expected: Outputs, got: Outputs, truth: Outputs) -> bool:
        """Whether further runs of the reference might show that an output is equal."""
        name = row.output
        if row.kind != "float" or row.margin is None or self.tolerance.is_by_hand(name) or name not in truth:
            return False
        reference, true = expected[name], truth[name]
        return true.shape == reference.shape and may_stand(row, reference, got[name], true)

    def _nearby(self, case: Case, choices: Sequence[Choice]) -> tuple[Outputs, ...]:
        """The reference's outputs for inputs that differ in the last digit only, or look up what does."""
        if any(is_float(array.dtype) for array in case.inputs.values()):
            found = [_under(self.reference, near, choices) for near in last_digits(case, self.narrow)]
        elif hasattr(self.reference, "run_under"):
            found = [_under(self.reference, case, choices, near) for near in look_ups(case, self.narrow)]
        else:
            return ()
        return tuple(outputs for outputs in found if outputs is not None)


def _under(
    runner: Runner, case: Case, choices: Sequence[Choice], rounded: tuple[int, float] | None = None
) -> Outputs | None:
    """The outputs of a case as another program might compute them, with these choices of experts; None: there are none.

    A runner that cannot replay choices, or whose model makes others, runs as it always does.
    """
    run_under = getattr(runner, "run_under", None)
    if run_under is not None:
        try:
            found: Outputs | None = run_under(case.inputs, choices, rounded)
        except (DiedError, MissingBackendError):
            raise
        except Exception:  # whatever a model raises
            found = None
        if found is not None:
            return found
    plain = _run(runner, case, first=False)
    return None if isinstance(plain, _Missing) else plain


def _run_case(
    reference: Runner, candidate: Runner, case: Case, judges: _Judges, *, first: bool
) -> CaseResult:
    expected = _run(reference, case, first)
    if isinstance(expected, _Missing):
        return CaseResult.of(case, "refused", expected.reason)
    _check_routing(judges.routing, expected)
    got = _run(candidate, case, first)
    if isinstance(got, _Missing):
        return CaseResult.of(case, "no memory" if got.for_memory else "failed", got.reason)
    return CaseResult.of(case, "compared", None, judges.judge(case, expected, got))


@dataclass(frozen=True)
class _Missing:
    """Why there are no outputs, in one line, and whether the engine ran out of memory."""

    reason: str
    for_memory: bool = False


def _run(runner: Runner, case: Case, first: bool) -> Outputs | _Missing:
    """The outputs, or why there are none."""
    try:
        return runner.run(case.inputs)
    except (DiedError, MissingBackendError):
        raise
    except UsageError as error:
        # At another size a refusal is a finding; on the example it means that the two models take different
        # inputs, and nothing can be said about them.
        if first:
            raise
        return _Missing(one_line(error))
    except Exception as error:  # whatever a model raises
        return _Missing(one_line(error), isinstance(error, NoMemoryError))


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
