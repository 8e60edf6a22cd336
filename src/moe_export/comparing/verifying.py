"""Compare two artifacts of any kind: where the inputs come from, and what else is known about each.

| candidate | reference | inputs |
|---|---|---|
| any | golden file | the stored ones (neither PyTorch nor the model is needed) |
| golden file | any | the stored ones |
| graph, engine | model file | the model's example, at the graph's free dimensions |
| model file | model file, graph | the reference's or the other's example |
| graph, engine | graph, engine | random, for the reference's input shapes (an engine's, if the candidate is one) |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moe_export.comparing.artifacts import (
    Artifact,
    about_artifacts,
    about_precision,
    can_replay,
    graph_example,
    graph_routing,
    graph_runner,
    known_of_graph,
    limits_of,
    metadata,
    narrowest,
    running_type,
    table_sizes,
)
from moe_export.comparing.checking_replay import GraphReplayer, MirroredReplayer, WatchedGraph, watchable
from moe_export.comparing.renaming import Renamed, by_position
from moe_export.comparing.request import Request
from moe_export.comparison_settings import (
    comparison_cases,
    picked,
    tolerance_of,
)
from moe_export.errors import UsageError
from moe_export.verify import Array, DimRange, Report, Runner, TensorSpec, compare
from moe_export.verify.golden import Golden, load_golden, recorded


def compare_artifacts(candidate: Artifact, reference: Artifact, request: Request) -> Report:
    """Compare two artifacts.

    Raises:
        UsageError: They take different inputs, or one of them cannot be read.
        MissingBackendError: One of them cannot be run here.
    """
    if "golden" in (candidate.kind, reference.kind):
        return _with_golden(candidate, reference, request)
    if "model" in (candidate.kind, reference.kind):
        from moe_export.comparing.verifying_models import compare_models

        return compare_models(candidate, reference, request)
    return _graphs(candidate, reference, request)


def _with_golden(candidate: Artifact, reference: Artifact, request: Request) -> Report:
    """The cases are the stored ones."""
    stored = load_golden((reference if reference.kind == "golden" else candidate).path)
    other = candidate if reference.kind == "golden" else reference
    runner, outputs = _opened(other, stored, request)
    runners: tuple[Runner, Runner] = (stored, runner) if other is candidate else (runner, stored)
    narrow = request.dtype if other is candidate else _asked_or_of(other, request)
    replays = other.kind == "graph" and can_replay(other)
    replayer = GraphReplayer(stored, other.path if replays else None, other.provider, outputs)
    cases = picked(iter([case.case for case in stored.cases]), request.settings.only)
    routing = stored.routing if other is candidate else ()
    runner, cases = recorded(request.recorder, runners[0], cases, routing)
    return compare(
        runner,
        runners[1],
        cases,
        tolerance=tolerance_of(narrow, request.tolerance),
        routing=routing,
        budget=request.settings.flips,
        time_limit=request.settings.time_limit,
        replayer=replayer if other is candidate else MirroredReplayer(replayer),
        about={
            **stored.about,
            **about_artifacts(candidate, reference),
            **about_precision(candidate, request.dtype),
        },
    )


def _opened(artifact: Artifact, stored: Golden, request: Request) -> tuple[Runner, Mapping[str, str]]:
    """The other artifact as a runner under the golden file's names, and its own output names → the file's."""
    if artifact.kind == "golden":
        return load_golden(artifact.path), {}
    if artifact.kind == "model":
        from moe_export.comparing.verifying_models import open_model

        opened = open_model(artifact, request)
        runner: Runner = opened.runner
        inputs, outputs = list(opened.subject.inputs), list(opened.subject.outputs)
    else:
        graph = graph_runner(artifact, running_type(artifact.path, request.dtype))
        runner = graph
        inputs, outputs = [spec.name for spec in graph.inputs], [spec.name for spec in graph.outputs]
    taken = list(stored.cases[0].case.inputs)
    if set(inputs) <= set(taken):  # a graph lacks inputs that its outputs do not depend on
        renamed = {name: name for name in inputs}
    elif len(inputs) == len(taken):
        renamed = dict(zip(taken, inputs, strict=True))
    else:
        raise UsageError(
            f"{artifact.text} takes {', '.join(inputs)}, but the golden file holds {', '.join(taken)}"
        )
    scores = {pair.scores for pair in stored.routing}
    kept = [name for name in stored.outputs if name in outputs or name not in scores]
    names = by_position(outputs, kept)
    return Renamed(runner, renamed, names), names


def _graphs(candidate: Artifact, reference: Artifact, request: Request) -> Report:
    facts = metadata(reference.path) | metadata(candidate.path)
    narrow = _asked_or_of(reference, request)
    theirs = graph_runner(reference, narrowest(reference.path) if reference.kind == "graph" else "float32")
    ours = graph_runner(candidate, running_type(candidate.path, narrow))
    # the example must be within the profile of an engine
    shown = (candidate, ours) if candidate.kind == "engine" else (reference, theirs)
    example, dims = graph_example(*shown, facts, request.seed)
    inputs = by_position([spec.name for spec in ours.inputs], [spec.name for spec in theirs.inputs])
    if set(inputs.values()) != {spec.name for spec in theirs.inputs}:
        raise UsageError(
            f"{candidate.text} takes {', '.join(inputs)}, "
            f"but {reference.text} takes {', '.join(spec.name for spec in theirs.inputs)}"
        )
    if shown[0] is candidate:
        example = {inputs[name]: array for name, array in example.items()}
    specs = [replace(spec, name=inputs.get(spec.name, spec.name)) for spec in shown[1].inputs]
    specs, dims = narrowed(specs, dims, ours.inputs, inputs)
    example = {spec.name: _cut(example[spec.name], spec) for spec in specs}
    outputs = by_position([spec.name for spec in ours.outputs], [spec.name for spec in theirs.outputs])
    tables = table_sizes(shown[0].path) if shown[0].kind == "graph" else {}
    known = known_of_graph(theirs, example, tables, candidate.path)
    limits = {inputs[name]: found for name, found in limits_of(ours).items()}
    known = replace(known, limits={**limits_of(theirs), **limits})
    made = comparison_cases(request.settings, specs, dims, example, request.seed, known=known)
    routing = graph_routing(reference.path) if reference.kind == "graph" else []
    runner, cases = recorded(request.recorder, watchable(reference, theirs, request.recorder), made, routing)
    return compare(
        runner,
        Renamed(ours, {theirs_name: own for own, theirs_name in inputs.items()}, outputs),
        cases,
        tolerance=tolerance_of(narrow, request.tolerance),
        routing=routing,
        budget=request.settings.flips,
        time_limit=request.settings.time_limit,
        replayer=_replayer(candidate, reference, inputs, outputs),
        about={**about_artifacts(candidate, reference), **about_precision(candidate, narrow)},
    )


def _replayer(
    candidate: Artifact, reference: Artifact, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> GraphReplayer | None:
    """A replayer if onnxruntime runs both and their inputs have the same names; else None."""
    runs = all((artifact.backend or "").startswith("onnxruntime") for artifact in (candidate, reference))
    if not runs or any(own != name for own, name in inputs.items()):
        return None
    watched = WatchedGraph(reference.path, reference.provider)
    return GraphReplayer(watched, candidate.path, candidate.provider, outputs)


def narrowed(
    specs: Sequence[TensorSpec],
    dims: Sequence[DimRange],
    others: Sequence[TensorSpec],
    names: Mapping[str, str],
) -> tuple[list[TensorSpec], list[DimRange]]:
    """The inputs and free dimensions, with the sizes that the other artifact fixes put in.

    A dimension that it fixes in one place is fixed in all.

    Args:
        specs: The inputs of one artifact, under the names used in the comparison.
        dims: Their free dimensions.
        others: The inputs of the other artifact.
        names: The other artifact's input names → those used in the comparison.
    """
    fixed: dict[str, int] = {}
    by_name = {names.get(spec.name, spec.name): spec for spec in others}
    for spec in specs:
        other = by_name.get(spec.name)
        for mine, theirs in zip(spec.shape, other.shape if other else (), strict=False):
            if isinstance(mine, str) and isinstance(theirs, int):
                fixed[mine] = theirs
    shapes = [
        replace(
            spec, shape=tuple(fixed.get(size, size) if isinstance(size, str) else size for size in spec.shape)
        )
        for spec in specs
    ]
    return shapes, [dim for dim in dims if dim.name not in fixed]


def _cut(array: Array, spec: TensorSpec) -> Array:
    """The example repeated or cut to the sizes that were fixed after it was made."""
    for axis, size in enumerate(spec.shape):
        if isinstance(size, int) and array.shape[axis] != size:
            array = array.take(range(size), axis=axis, mode="wrap")
    return array


def _asked_or_of(reference: Artifact, request: Request) -> str:
    """The type to judge by: the one that the user named, else the narrowest that a reference graph computes in."""
    if request.dtype != "float32" or reference.kind != "graph":
        return request.dtype
    return narrowest(reference.path)
