"""Comparisons with a model file: PyTorch runs it, and its trace shows which outputs are expert ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from moe_export.comparing import apart
from moe_export.comparing.artifacts import (
    Artifact,
    GraphRunner,
    about_artifacts,
    about_precision,
    can_replay,
    graph_routing,
    graph_runner,
    limits_of,
    metadata,
    running_type,
)
from moe_export.comparing.checking import verify_file
from moe_export.comparing.checking_replay import GraphReplayer, MirroredReplayer, watchable
from moe_export.comparing.explaining import Remembering, explain, look_inside
from moe_export.comparing.known import known_of_model
from moe_export.comparing.layerwise_artifacts import by_blocks, compare_blocks
from moe_export.comparing.matching import match_graph, reference_of, stated_domain
from moe_export.comparing.renaming import Renamed, by_position
from moe_export.comparing.request import Request
from moe_export.comparing.verifying_packed import compare_packed, is_packed
from moe_export.comparison_settings import Own, comparison_cases, tolerance_of
from moe_export.errors import MoeExportError, UsageError
from moe_export.export.frontend.load import load_subject, split_spec
from moe_export.export.frontend.script import run_file
from moe_export.export.frontend.source import is_user_file
from moe_export.export.frontend.subject import Subject
from moe_export.export.gates.routing import find_routings, routing_outputs
from moe_export.export.onnx.simplify import as_numpy
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.tracing.trace import Traced, quiet, trace
from moe_export.export.weights.lazy import in_memory
from moe_export.verify import (
    Array,
    DimRange,
    Report,
    RoutingPair,
    Runner,
    TensorSpec,
    compare,
)
from moe_export.verify.golden import recorded


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A loaded model, and the runner of it."""

    subject: Subject
    runner: Runner


def open_model(artifact: Artifact, request: Request) -> OpenModel:
    """Load a model file; with the backend `torch-float64` it runs in float64, and its outputs are rounded.

    Raises:
        UsageError: The file cannot be loaded, or has no model.
    """
    subject = load_subject(
        artifact.text,
        init=request.init,
        inputs=request.inputs,
        memory=request.memory,
        apart=apart.fork_model,
    )
    kind = apart.ROUNDED_FLOAT64 if artifact.backend == "torch-float64" else apart.TORCH
    return OpenModel(subject, apart.reference(subject, subject.outputs, kind))


def compare_models(candidate: Artifact, reference: Artifact, request: Request) -> Report:
    """Compare two artifacts, at least one of them a model file."""
    if reference.kind == "model" and candidate.kind in {"graph", "engine"}:
        return _graph_against_model(candidate, reference, request)
    if candidate.kind == "model" and reference.kind == "model":
        return _two_models(candidate, reference, request)
    return _model_against_graph(candidate, reference, request)


def _graph_against_model(candidate: Artifact, reference: Artifact, request: Request) -> Report:
    original = open_model(reference, request).subject
    facts = metadata(candidate.path)
    packed = is_packed(facts) and (candidate.backend or "").startswith("onnxruntime")
    if by_blocks(original, candidate, request.how):
        if packed:
            return compare_packed(original, candidate, request, facts, reference.text)
        return compare_blocks(original, candidate, request, reference.text)
    if reference.backend == "torch-float64":
        return _float64_against_graph(candidate, reference, request, original)
    settings = replace(request.settings, own=own_inputs(reference, original))
    if packed:
        return compare_packed(original, candidate, replace(request, settings=settings), facts, reference.text)
    return compare_subject(original, candidate, replace(request, settings=settings), reference.text)


def compare_subject(original: Subject, candidate: Artifact, request: Request, called: str) -> Report:
    """Compare a graph or an engine with a model that is loaded.

    Args:
        original: The model; the graph may be of a gate of it.
        candidate: The graph or the engine.
        request: How to compare; its recorder and its settings are used.
        called: What the report calls the model.

    Raises:
        UsageError: The graph takes other inputs than the model, or the model has no gate of the name asked for.
        MissingBackendError: The candidate cannot be run here.
    """
    dtype, facts = request.dtype, metadata(candidate.path)
    runner = graph_runner(candidate, running_type(candidate.path, dtype))
    counterpart = reference_of(original, runner, facts, request.gate)
    subject = counterpart.subject
    with in_memory(subject.module):
        settings = request.settings if subject is original else replace(request.settings, own=None)
        matched = match_graph(runner, subject, counterpart.routing, facts)
        replays = candidate.kind == "graph" and can_replay(candidate)
        tolerance = tolerance_of(dtype, request.tolerance)
        remembering = Remembering(runner)
        report = verify_file(
            cast(GraphRunner, remembering),  # it has the same attributes as a runner of graphs
            matched.subject,
            example=matched.example,
            dims=matched.dims,
            routing=matched.routing,
            tolerance=tolerance,
            seed=request.seed,
            graph=candidate.path if replays else None,
            provider=candidate.provider,
            settings=settings,
            recorder=request.recorder,
            about={
                "candidate": candidate.text,
                "reference": called,
                **line_of(original),
                **counterpart.about,
                **about_precision(candidate, dtype),
            },
            narrow=dtype,
            domain=stated_domain(facts),
            limits=limits_of(runner),
        )
        if request.why is not None and candidate.kind == "graph":
            found = explain(
                candidate.path, remembering, report, original, matched.subject, tolerance, matched.routing
            )
            if request.inside and found is None and not report.exit_code:
                found = look_inside(candidate.path, remembering, report, original, matched.subject)
            request.why.extend([] if found is None else [found])
        return report


def _float64_against_graph(
    candidate: Artifact, reference: Artifact, request: Request, original: Subject
) -> Report:
    """Compare with the model's float64 run, rounded to the model's types, as the reference itself."""
    dtype, facts = request.dtype, metadata(candidate.path)
    runner = graph_runner(candidate, running_type(candidate.path, dtype))
    counterpart = reference_of(original, runner, facts, request.gate)
    own = own_inputs(reference, original) if counterpart.subject is original else None
    matched = match_graph(runner, counterpart.subject, counterpart.routing, facts)
    subject = matched.subject
    settings = replace(request.settings, own=own)
    wide = apart.reference(subject, subject.outputs, apart.ROUNDED_FLOAT64)
    plan = (list(runner.inputs), matched.ranges, matched.arrays, request.seed)
    with quiet():
        known = known_of_model(
            subject, *plan, candidate.path if candidate.kind == "graph" else None, stated_domain(facts)
        )
    known = replace(known, limits=limits_of(runner))
    cases = comparison_cases(settings, *plan, known=known)
    watched, cases = recorded(request.recorder, wide, cases, matched.pairs)
    replays = candidate.kind == "graph" and can_replay(candidate)
    with quiet():
        return compare(
            watched,
            runner,
            cases,
            tolerance=tolerance_of(dtype, request.tolerance),
            routing=matched.pairs,
            budget=request.settings.flips,
            time_limit=request.settings.time_limit,
            truth=apart.reference(subject, subject.outputs, apart.FLOAT64),
            replayer=GraphReplayer(wide, candidate.path if replays else None, candidate.provider),
            about={
                **about_artifacts(candidate, reference),
                **line_of(original),
                **counterpart.about,
                **about_precision(candidate, dtype),
            },
            narrow=dtype,
        )


def _two_models(candidate: Artifact, reference: Artifact, request: Request) -> Report:
    theirs, ours = open_model(reference, request), open_model(candidate, request)
    inputs = by_position(list(ours.subject.inputs), list(theirs.subject.inputs))
    outputs = by_position(ours.subject.outputs, theirs.subject.outputs)
    if set(inputs.values()) != set(theirs.subject.inputs):
        raise UsageError(
            f"{candidate.text} takes {', '.join(inputs)}, "
            f"but {reference.text} takes {', '.join(theirs.subject.inputs)}"
        )
    traced = _traced(theirs.subject)
    specs, dims = _specs_of(theirs.subject, traced)
    arrays = {name: as_numpy(tensor) for name, tensor in theirs.subject.inputs.items()}
    routing = [] if traced is None else _pairs(traced)
    settings = replace(request.settings, own=own_inputs(reference, theirs.subject))
    with quiet():
        known = known_of_model(theirs.subject, specs, dims, arrays, request.seed)
    made = comparison_cases(settings, specs, dims, arrays, request.seed, known=known)
    pairs = [RoutingPair(*pair) for pair in routing]
    runner, cases = recorded(request.recorder, theirs.runner, made, pairs)
    with quiet():
        return compare(
            runner,
            Renamed(ours.runner, {name: own for own, name in inputs.items()}, outputs),
            cases,
            tolerance=request.tolerance,
            routing=pairs,
            budget=request.settings.flips,
            time_limit=request.settings.time_limit,
            truth=apart.reference(theirs.subject, theirs.subject.outputs, apart.FLOAT64),
            about={**about_artifacts(candidate, reference), **line_of(ours.subject)},
        )


def _model_against_graph(candidate: Artifact, reference: Artifact, request: Request) -> Report:
    """Compare a model with a graph that is right by definition; the model gives the example."""
    opened, graph = open_model(candidate, request), graph_runner(reference)
    matched = match_graph(graph, opened.subject, facts=metadata(reference.path))
    subject = matched.subject
    plan = (list(graph.inputs), matched.ranges, matched.arrays, request.seed)
    with quiet():
        known = known_of_model(
            subject,
            *plan,
            reference.path if reference.kind == "graph" else None,
            stated_domain(metadata(reference.path)),
        )
    known = replace(known, limits=limits_of(graph))
    made = comparison_cases(request.settings, *plan, known=known)
    routing = graph_routing(reference.path) if reference.kind == "graph" else []
    runner, cases = recorded(request.recorder, watchable(reference, graph, request.recorder), made, routing)
    names = by_position(opened.subject.outputs, subject.outputs)
    inputs = dict(zip(subject.inputs, opened.subject.inputs, strict=True))
    plain = apart.reference(subject, subject.outputs)
    replays = (reference.backend or "").startswith("onnxruntime")
    replayer = GraphReplayer(plain, reference.path if replays else None, reference.provider)
    with quiet():
        return compare(
            runner,
            Renamed(opened.runner, inputs, names),
            cases,
            tolerance=request.tolerance,
            routing=routing,
            budget=request.settings.flips,
            time_limit=request.settings.time_limit,
            replayer=MirroredReplayer(replayer),
            truth=apart.reference(subject, subject.outputs, apart.FLOAT64),
            about={**about_artifacts(candidate, reference), **line_of(opened.subject)},
        )


def record_model(artifact: Artifact, request: Request) -> tuple[RoutingPair, ...]:
    """Run a model alone over all cases, into the request's recorder, which must be given.

    Returns:
        Outputs that are expert ids, each with the output of its weights and that of its scores, if any.
    """
    assert request.recorder is not None
    opened = open_model(artifact, request)
    traced = _traced(opened.subject)
    specs, dims = _specs_of(opened.subject, traced)
    arrays = {name: as_numpy(tensor) for name, tensor in opened.subject.inputs.items()}
    settings = replace(request.settings, own=own_inputs(artifact, opened.subject))
    runner = request.recorder.on(opened.runner)
    with quiet():
        known = known_of_model(opened.subject, specs, dims, arrays, request.seed)
        for case in request.recorder.watch(
            comparison_cases(settings, specs, dims, arrays, request.seed, known=known)
        ):
            if case.reserve:
                break
            try:
                runner.run(case.inputs)
            except Exception:  # a size that the model does not take
                continue
    return tuple(RoutingPair(*pair) for pair in (() if traced is None else _pairs(traced)))


def _traced(subject: Subject) -> Traced | None:
    try:
        return trace(subject)
    except MoeExportError:
        return None  # the model can still be run, at the example's sizes


def _specs_of(subject: Subject, traced: Traced | None) -> tuple[list[TensorSpec], list[DimRange]]:
    shapes: Mapping[str, Any] = {} if traced is None else traced.inputs
    specs = [
        TensorSpec(name, as_numpy(tensor).dtype.name, tuple(shapes.get(name, tensor.shape)))
        for name, tensor in subject.inputs.items()
    ]
    dims = () if traced is None else traced.dims
    return specs, [DimRange(dim.name, dim.traced, dim.minimum, dim.maximum) for dim in dims]


def _pairs(traced: Traced) -> list[tuple[str, str | None, str | None]]:
    return [pair for routing in find_routings(traced) for pair in routing_outputs(routing, traced)]


def line_of(subject: Subject) -> dict[str, str]:
    """`file:line` of the model's `forward`; line 1 of the model's file where `forward` is a library's."""
    code = getattr(getattr(type(subject.module), "forward", None), "__code__", None)
    if code is None or not is_user_file(code.co_filename):
        return {"line": f"{subject.source}:1"}
    return {"line": f"{code.co_filename}:{code.co_firstlineno}"}


def own_inputs(artifact: Artifact, subject: Subject) -> Own | None:
    """The function `inputs(seed)` of a model's file, returning arrays by the model's input names; None without one.

    Raises:
        UsageError: The returned function raises it where `inputs` raises or returns other inputs than the model's.
    """
    path, _ = split_spec(artifact.text)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    if "def inputs(" not in text:
        return None
    module, _ = run_file(path, as_script=False, stop_at_call=False)
    function = getattr(module, "inputs", None)
    if not callable(function):
        return None

    def made(seed: int) -> dict[str, Array]:
        try:
            found = function(seed)
        except Exception as error:
            raise UsageError(
                f"inputs({seed}) raised {type(error).__name__}: {error}", where=str(path)
            ) from None
        if isinstance(found, Mapping) and set(found) >= set(subject.inputs):
            return {name: np.asarray(as_numpy(found[name])) for name in subject.inputs}
        tensors = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        if len(tensors) != len(subject.inputs):
            raise UsageError(
                f"inputs({seed}) returned {len(tensors)} tensors, the model takes {', '.join(subject.inputs)}",
                where=str(path),
            )
        return dict(zip(subject.inputs, map(as_numpy, tensors), strict=True))

    return made
