"""Why a graph is not equal to its model, as `verify` reports it: the first faulty node, a reproduction, an overlay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypedDict

import onnx

from moe_export.comparing import apart
from moe_export.comparing.artifacts import GraphRunner, narrowest
from moe_export.comparing.localising import ENGINE_AT_FAULT, localise, open_graph, program_values
from moe_export.comparison_settings import tolerance_of
from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.trace import quiet, trace
from moe_export.verify import (
    Array,
    Case,
    Report,
    RoutingPair,
    Tolerance,
    compare,
)
from moe_export.verify.inputs.regimes import NORMAL
from moe_export.verify.localise.level import Cut, Value
from moe_export.verify.localise.optimised import EngineFault, OptimiserFault, find_engine_fault
from moe_export.verify.localise.overlay import write_overlay
from moe_export.verify.localise.repro import write_repro
from moe_export.verify.localise.search import Localisation, NodeError, find_faulty_node
from moe_export.verify.runner import one_line
from moe_export.verify.runners.openvino_runner import OpenVinoRunner, run_part

Explained: TypeAlias = Localisation | OptimiserFault | EngineFault | str
"""The first faulty node, of the graph or as an engine runs it; or a sentence that says why none can be named."""
INSIDE = 3
"""The number of cases searched for nodes that are wrong although the outputs are right."""


class Remembering:
    """A runner that keeps the inputs of every run, so that a case which differs can be examined afterwards.

    Args:
        runner: The runner that it passes them on to.
    """

    def __init__(self, runner: GraphRunner) -> None:
        self.name, self.inputs, self.outputs = runner.name, runner.inputs, runner.outputs
        self.given: list[Mapping[str, Array]] = []
        self._runner = runner

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        self.given.append(inputs)
        return self._runner.run(inputs)


class _OfCase(TypedDict):
    case: str
    faulty_node: Annotated[dict[str, Any] | None, NodeError | None]


class Why(_OfCase, total=False):
    """The first faulty node of a graph, at which level of onnxruntime's optimisation it shows; or why none is named.

    `engine` is there if onnxruntime computes the graph right: the one that does not.
    """

    level: str
    engine: str
    seconds: float
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Why a graph is not equal.

    Attributes:
        at: The label of the case that was examined.
        found: The first faulty node, or a sentence that says why none can be named.
        model: The graph, as `open_graph` returns it.
        inputs: The case's inputs.
        expected: The outputs that it should have; empty where only a node is wrong.
    """

    at: str
    found: Explained
    model: onnx.ModelProto
    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]

    def __str__(self) -> str:
        return f"{self.found}\n(found in the case '{self.at}')"

    def to_dict(self) -> Why:
        """Plain data, for JSON."""
        if isinstance(self.found, str):
            return {"case": self.at, "faulty_node": None, "reason": self.found}
        localisation = self.found if isinstance(self.found, Localisation) else self.found.localisation
        found = localisation.to_dict()
        why: Why = {
            "case": self.at,
            "level": self.found.level if isinstance(self.found, OptimiserFault) else "none",
            "faulty_node": found["faulty_node"],
            "seconds": found["seconds"],
        }
        if isinstance(self.found, EngineFault):
            why["engine"] = self.found.engine
        return why

    def write(self, folder: str | Path) -> list[Path]:
        """Write the reproduction, and the graph with each node's error, into a folder.

        Returns:
            The files that were written.
        """
        folder, localisation, level = Path(folder), None, "none"
        if isinstance(self.found, OptimiserFault):
            level = self.found.level
        elif isinstance(self.found, EngineFault):
            localisation = self.found.localisation
        elif isinstance(self.found, Localisation):
            localisation = self.found
        whole = Cut(self.model, dict(self.inputs), _outputs_of(self.model, self.expected))
        cut = whole if localisation is None or localisation.cut is None else localisation.cut
        try:
            files = write_repro(folder, cut, str(self), level=level)
        except ValueError:  # a sequence cannot be stored as a tensor, so the whole graph is the reproduction
            files = write_repro(folder, whole, str(self), level=level)
        return files if localisation is None else [*files, *write_overlay(folder, self.model, localisation)]


def _outputs_of(model: onnx.ModelProto, expected: Mapping[str, Array]) -> dict[str, Value]:
    return {output.name: expected[output.name] for output in model.graph.output if output.name in expected}


def explain(
    path: Path,
    candidate: Remembering,
    report: Report,
    subject: Subject,
    reference: Subject,
    tolerance: Tolerance,
    routing: Sequence[tuple[str, str | None, str | None]],
) -> Explanation | None:
    """Find out why a graph got a case wrong: the first one that it did.

    Args:
        path: The graph.
        candidate: The runner that ran it in the comparison.
        report: The result of the comparison.
        subject: The model that it was made from.
        reference: What it was compared with, under the graph's names: the model, or a gate of it.
        tolerance: For floats.
        routing: Outputs that are expert indices, with those of their weights and scores.

    Returns:
        The explanation; None if no case is wrong.
    """
    ran = [case for case in report.cases if case.outcome != "refused"]
    wrong = (
        (case, inputs)
        for case, inputs in zip(ran, candidate.given, strict=False)
        if case.outcome == "failed" or any(not judgement.ok for judgement in case.judgements)
    )
    case, inputs = next(wrong, (None, {}))
    if case is None:
        return None
    model = open_graph(path, subject.source.parent)
    given = {value.name: inputs[value.name] for value in model.graph.input if value.name in inputs}
    with quiet():
        expected = apart.reference(reference, reference.outputs).run(inputs)

        pairs = [RoutingPair(*pair) for pair in routing]

        def is_right(outputs: Mapping[str, Value], narrow: str = "float32") -> bool:
            one = Case(case.label, case.seed, dict(case.sizes), given)
            found = compare(
                _Fixed(expected),
                _Fixed(outputs),
                [one],
                tolerance=tolerance_of(narrow, tolerance),
                routing=pairs,
                narrow=narrow,
                rounded=None
                if narrow == "float32"
                else apart.reference(reference, reference.outputs, narrow),
            )
            return found.verdict != "not equal"

        # A new export in half precision is as right as that precision allows, and no more.
        rounds = partial(is_right, narrow=narrowest(path))
        try:
            found: Explained = localise(model, given, subject, reference, is_right, rounds)
            if found == ENGINE_AT_FAULT and candidate.name == OpenVinoRunner.name:
                found = find_engine_fault(model, given, candidate.name, run_part)
        except Exception as error:  # the report is complete without an explanation
            return Explanation(case.label, f"no node can be named: {one_line(error)}", model, given, expected)
    return Explanation(case.label, found, model, given, expected)


def look_inside(
    path: Path, candidate: Remembering, report: Report, subject: Subject, reference: Subject
) -> Explanation | None:
    """Look for a node that is wrong although the outputs are within the tolerance.

    Args:
        path: The graph.
        candidate: The runner that ran it in the comparison.
        report: The result of the comparison; the first `INSIDE` ordinary cases are examined.
        subject: The model that it was made from.
        reference: What it was compared with, under the graph's names.

    Returns:
        The first faulty node; None if every node that can be matched with an operator of the model is right.
    """
    ran = [case for case in report.cases if case.outcome != "refused"]
    pairs = [pair for pair in zip(ran, candidate.given, strict=False) if pair[0].regime == NORMAL]
    model = open_graph(path, subject.source.parent)
    with quiet():
        traced = trace(reference)
        looked = 0
        for case, inputs in pairs:
            given = {value.name: inputs[value.name] for value in model.graph.input if value.name in inputs}
            known = program_values(model, given, traced)
            if known is None:  # no node can be matched, e.g. at a size that the trace was not made for
                continue
            found = find_faulty_node(model, given, known)
            if found.faulty is not None:
                return Explanation(case.label, found, model, given, {})
            looked += 1
            if looked == INSIDE:
                break
    return None


class _Fixed:
    """A runner that returns outputs computed elsewhere, whatever the inputs."""

    name = "fixed"

    def __init__(self, outputs: Mapping[str, Any]) -> None:
        self._outputs = dict(outputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self._outputs
