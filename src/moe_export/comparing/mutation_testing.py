"""Mutation tests of the check: mutants of a right graph, each compared with the model as `verify` would.

The cases and the model's outputs for them are computed once; a mutant is run until a case shows a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from moe_export.comparing import apart
from moe_export.comparing.artifacts import metadata, running_type
from moe_export.comparing.checking_replay import GraphReplayer
from moe_export.comparing.explaining import INSIDE
from moe_export.comparing.known import known_of_model
from moe_export.comparing.localising import program_values
from moe_export.comparing.matching import match_graph, reference_of, stated_domain
from moe_export.comparing.mutant_result import MutantResult, result_of
from moe_export.comparing.verifying_packed import is_packed, stand_in_of
from moe_export.comparison_settings import ComparisonSettings, comparison_cases, tolerance_of
from moe_export.errors import MissingBackendError, MoeExportError, UsageError
from moe_export.export.frontend.load import load_subject
from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.trace import trace
from moe_export.running.choices import runner_of
from moe_export.verify import (
    Array,
    Case,
    CaseResult,
    Choice,
    Report,
    RoutingPair,
    Runner,
    Tolerance,
    compare,
)
from moe_export.verify.float64_graph import run_in_float64
from moe_export.verify.inputs.regimes import NORMAL
from moe_export.verify.localise.reference import ReferenceValues
from moe_export.verify.localise.search import find_faulty_node
from moe_export.verify.mutants.baked import baked_mutants, run_values
from moe_export.verify.mutants.mutant import Mutant
from moe_export.verify.mutants.nodes import node_mutants
from moe_export.verify.mutants.packed import packed_mutants
from moe_export.verify.mutants.weights import weight_mutants
from moe_export.verify.runner import one_line

_SAME = 1e-12
"""Two graphs compute the same if they differ by no more than this in float64, relative to the largest value."""
_ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # 1 to the next larger number

Replayer = Callable[[Any, Path], Any]


@dataclass(frozen=True)
class Check:
    """The check that a graph must pass.

    Attributes:
        model: The right graph.
        cases: The cases of the comparison.
        reference: The model, as a runner that computes each case once and remembers the outputs.
        truth: The model in float64, likewise.
        replayer: Makes a runner that replays the model's choices in a graph, from the reference and the graph's file.
        tolerance: For floats.
        routing: Outputs that are expert indices.
        dtype: The narrowest type that the graph computes in.
        inside: For a check that compares nodes, too: label, inputs and the model's intermediate values of some cases.
    """

    model: onnx.ModelProto
    cases: Sequence[Case]
    reference: Runner
    truth: Runner | None
    replayer: Replayer
    tolerance: Tolerance
    routing: Sequence[RoutingPair]
    dtype: str = "float32"
    inside: Sequence[tuple[str, Mapping[str, Array], ReferenceValues]] = ()

    def judge(self, path: Path) -> Report:
        """Compare a graph with the model, up to the first case that differs.

        Raises:
            UsageError: onnxruntime does not open the graph, or the graph takes other inputs.
        """
        wrong: list[CaseResult] = []

        def note(result: CaseResult) -> None:
            if result.outcome == "failed" or any(not judgement.ok for judgement in result.judgements):
                wrong.append(result)

        def until_wrong() -> Iterator[Case]:
            for case in self.cases:
                if wrong:
                    return
                yield case

        return compare(
            self.reference,
            runner_of(path, "cpu", self.dtype),
            until_wrong(),
            tolerance=self.tolerance,
            routing=self.routing,
            other_sizes=len(self.cases),
            truth=self.truth,
            replayer=self.replayer(self.reference, path),
            progress=note,
        )

    def try_mutant(self, mutant: Mutant, folder: Path) -> MutantResult:
        """Compare one mutant with the model."""
        path = folder / "mutant.onnx"
        try:
            onnx.save(mutant.of(self.model), path)
            report = self.judge(path)
        except MissingBackendError:
            raise
        except MoeExportError as error:
            return result_of(mutant, "stillborn", one_line(error))
        for case in report.cases:
            if case.outcome == "failed" or any(not judgement.ok for judgement in case.judgements):
                return result_of(mutant, "caught", case.label)
        for label, inputs, known in self.inside:
            if find_faulty_node(mutant.of(self.model), inputs, known).faulty is not None:
                return result_of(mutant, "caught", f"{label}, inside")
        off = self.difference(mutant)
        if off <= _SAME:
            return result_of(mutant, "equivalent", off=off)
        rounding = _ROUNDING[self.dtype]
        return result_of(mutant, "below rounding" if off <= rounding else "survived", off=off)

    def difference(self, mutant: Mutant) -> float:
        """The largest difference from the right graph in float64 over all cases, relative to the largest value.

        Infinite if the mutant fails or gives another shape; NaN if no case can be run in float64, which proves nothing.
        """
        wrong = mutant.of(self.model)
        found: list[float] = []
        for case in self.cases:
            inputs = {value.name: case.inputs[value.name] for value in self.model.graph.input}
            try:
                right = run_in_float64(self.model, inputs)
            except Exception:  # a case that the graph itself refuses proves nothing
                continue
            try:
                ours = run_in_float64(wrong, inputs)
            except Exception:  # a mutant that fails is not equivalent
                return float("inf")
            found += [_relative_error(np.asarray(a), np.asarray(b)) for a, b in zip(right, ours, strict=True)]
        return max(found, default=float("nan"))


def _relative_error(right: Array, ours: Array) -> float:
    """The largest error relative to the largest value; infinite if shapes, NaNs or infinities differ."""
    if right.shape != ours.shape:
        return float("inf")
    right, ours = right.astype(np.float64), ours.astype(np.float64)
    finite = np.isfinite(right) & np.isfinite(ours)
    if not (finite | (right == ours) | (np.isnan(right) & np.isnan(ours))).all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(right - ours)[finite].max() / max(np.abs(right[finite]).max(), 1e-300))


class Remembered:
    """A runner that computes each case once, and then repeats the outputs or the exception.

    Args:
        runner: The runner that it asks.
        cases: The cases. They must stay alive: a case is recognised by the identity of its inputs.
    """

    def __init__(self, runner: Any, cases: Sequence[Case]) -> None:
        self.name = runner.name
        self._runner = runner
        self._cases = cases
        self._answers: dict[tuple[str, int], Any] = {}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for a case's inputs."""
        return dict(self._once("run", inputs))

    def run_watched(self, inputs: Mapping[str, Array]) -> Any:
        """The outputs, and the choices that the model made."""
        return self._once("run_watched", inputs)

    def run_under(
        self,
        inputs: Mapping[str, Array],
        choices: Sequence[Choice],
        rounded: tuple[int, float] | None = None,
    ) -> Any:
        """The outputs under given choices or roundings; remembered only where there are none."""
        if choices or rounded is not None:
            return self._runner.run_under(inputs, choices, rounded)
        return self._once("run_under", inputs, choices)

    def scores_under(self, inputs: Mapping[str, Array], choices: Sequence[Choice]) -> Any:
        """The scores of each choice, the earlier ones made as given."""
        return self._runner.scores_under(inputs, choices)

    def _once(self, method: str, inputs: Mapping[str, Array], *rest: Any) -> Any:
        # inputs derived from a case are not kept alive, so their id may be reused
        if all(case.inputs is not inputs for case in self._cases):
            return getattr(self._runner, method)(inputs, *rest)
        key = (method, id(inputs))
        if key not in self._answers:
            try:
                self._answers[key] = getattr(self._runner, method)(inputs, *rest)
            except Exception as error:  # a model may raise anything
                self._answers[key] = error
        answer = self._answers[key]
        if isinstance(answer, Exception):
            raise answer
        return answer


def all_mutants(model: onnx.ModelProto, example: Mapping[str, Array], seed: int = 0) -> list[Mutant]:
    """Every mutant of a graph.

    Args:
        model: The graph.
        example: Inputs to run the graph on: some mutants replace a value by a constant from that run.
        seed: Chooses the elements of weights that are changed.

    Raises:
        UsageError: The graph does not run on the example.
    """
    try:
        values = run_values(model, example)
        ranks = {name: array.ndim for name, array in {**values, **example}.items()}
        ranks |= {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
        found = [*weight_mutants(model, seed), *node_mutants(model, ranks), *baked_mutants(model, example)]
        return [*found, *packed_mutants(model)]
    except MoeExportError:
        raise
    except Exception as error:
        raise UsageError(f"the graph cannot be run: {one_line(error)}") from error


def open_check(  # noqa: PLR0913  each has a name
    path: Path,
    against: str,
    init: tuple[str, ...] = (),
    inputs: tuple[str, ...] = (),
    tolerance: Tolerance | None = None,
    seed: int = 0,
    thorough: bool = False,
    inside: bool = False,
    *,
    dtype: str = "float32",
    gate_of: str | None = None,
) -> Check:
    """The check that `verify` would make, with the same cases.

    Args:
        path: The right graph.
        against: The model's file.
        init: Arguments of its class.
        inputs: Example inputs of its class.
        tolerance: For floats.
        seed: Of the inputs.
        thorough: Whether every regime is tried.
        inside: Whether nodes are compared, too.
        dtype: The narrowest type that the graph may compute in.
        gate_of: The module whose gate the graph is.

    Raises:
        UsageError: The graph cannot be read, or is not equal to the model even before it is mutated.
    """
    facts = metadata(path)
    runner = runner_of(path, "cpu", running_type(path, dtype))
    original = load_subject(against, init=init, inputs=inputs, apart=apart.fork_model)
    counterpart = reference_of(original, runner, facts, gate_of)
    matched = match_graph(runner, counterpart.subject, counterpart.routing, facts)
    subject = matched.subject
    cases: list[Case] = []

    plan = (list(runner.inputs), matched.ranges, matched.arrays, seed)
    known = known_of_model(subject, *plan, path, stated_domain(facts))

    def watched() -> Iterator[Case]:
        for case in comparison_cases(ComparisonSettings(thorough=thorough), *plan, known=known):
            cases.append(case)
            yield case

    if is_packed(facts):
        stand_in = stand_in_of(original, facts)
        torch_runner, truth = Remembered(stand_in.runner, cases), Remembered(stand_in.truth, cases)
    else:
        torch_runner = Remembered(apart.reference(subject, subject.outputs), cases)
        truth = Remembered(apart.reference(subject, subject.outputs, apart.FLOAT64), cases)
    check = Check(
        onnx.load(path),
        cases,
        torch_runner,
        truth,
        GraphReplayer,
        tolerance_of(dtype, tolerance or Tolerance()),
        matched.pairs,
        dtype,
    )
    report = compare(
        check.reference,
        runner,
        watched(),
        tolerance=check.tolerance,
        routing=check.routing,
        truth=truth,
        replayer=check.replayer(check.reference, path),
    )
    if report.exit_code:
        raise UsageError(
            f"{path} is {report.verdict} to {against} even before it is mutated",
            hint=f"moe-export verify {path} --against {against} shows where",
        )
    return replace(check, inside=_inside(check, subject)) if inside else check


def _inside(check: Check, subject: Subject) -> list[tuple[str, Mapping[str, Array], ReferenceValues]]:
    """Label, inputs and the model's intermediate values of the first `INSIDE` ordinary cases."""
    traced = trace(subject)
    found: list[tuple[str, Mapping[str, Array], ReferenceValues]] = []
    for case in [case for case in check.cases if case.regime == NORMAL]:
        inputs = {value.name: case.inputs[value.name] for value in check.model.graph.input}
        known = program_values(check.model, inputs, traced)
        if known is not None:
            found.append((case.label, inputs, known))
        if len(found) == INSIDE:
            break
    return found
