"""Compare a graph with the model it came from: where the export room and the verify room meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moe_export.comparing import apart
from moe_export.comparing.artifacts import GraphRunner, running_type
from moe_export.comparing.checking_packed import StandIn, written
from moe_export.comparing.checking_replay import GraphReplayer
from moe_export.comparing.decoding import with_decoding
from moe_export.comparing.known import known_of_model
from moe_export.comparison_settings import (
    DEFAULT_SETTINGS,
    ComparisonSettings,
    comparison_cases,
    tolerance_of,
)
from moe_export.domain import Domain
from moe_export.export.decoder.whole import DecoderModule
from moe_export.export.frontend.subject import Subject
from moe_export.export.onnx.simplify import as_numpy
from moe_export.export.pipeline import Graph
from moe_export.export.tracing.dims import Dim
from moe_export.export.tracing.trace import quiet
from moe_export.running.choices import replaying_and_chooser, runner_of
from moe_export.verify import (
    DimRange,
    Report,
    RoutingPair,
    TensorSpec,
    Tolerance,
    cases,
    compare,
)
from moe_export.verify.golden import Recorder, recorded
from moe_export.verify.inputs.sizes import shape_at
from moe_export.verify.reports.findings import PART
from moe_export.verify.specs import Array

Routing = Sequence[tuple[str, str | None, str | None]]


def verify_graph(
    graph: Graph,
    path: Path,
    *,
    tolerance: Tolerance,
    seed: int = 0,
    provider: str = "cpu",
    settings: ComparisonSettings = DEFAULT_SETTINGS,
) -> tuple[Report, tuple[Dim, ...]]:
    """Compare an exported graph with its reference over the sizes of its dynamic dimensions.

    Args:
        graph: The graph and its reference.
        path: The file that it was written to.
        tolerance: For floats; a graph in half precision gets the wider defaults of its type.
        seed: Of the inputs.
        provider: Where onnxruntime runs, `cpu` or `cuda`.
        settings: How much to try.

    Returns:
        The report, and the graph's dimensions. A dimension's minimum is lowered to the smallest size at which the graph
        was found right: the tracer's bound is often only caution, so sizes below it are tried first.
    """
    if graph.quantized is not None:
        return _verify_packed(graph, path, tolerance, seed, provider, settings)
    candidate = runner_of(path, provider, running_type(path, graph.dtype))
    tolerance = tolerance_of(graph.dtype, tolerance)

    example, sizes = _as_given(graph)

    def verify(dims: Sequence[Dim]) -> Report:
        return verify_file(
            candidate,
            graph.reference,
            example=example,
            dims=[replace(dim, traced=sizes[dim.name]) for dim in dims],
            routing=graph.routing,
            tolerance=tolerance,
            seed=seed,
            graph=path,
            provider=provider,
            settings=settings,
            narrow=graph.dtype,
            domain=Domain(graph.traced.conditions),
        )

    free = tuple(replace(dim, minimum=min(dim.minimum, 1)) for dim in graph.traced.dims)
    report = verify(free)
    if report.verdict == "unfinished":
        return report, graph.traced.dims
    if report.exit_code and free != graph.traced.dims:
        report, free = verify(graph.traced.dims), graph.traced.dims
    if report.exit_code and graph.wide is not None:
        report = _with_the_same_experts(graph, report, tolerance, seed, provider) or report
    if report.exit_code:
        return report, graph.traced.dims
    seen = {
        dim.name: min(dict(case.sizes).get(dim.name, dim.traced) for case in report.compared)
        for dim in graph.traced.dims
        if report.compared
    }
    return report, tuple(
        replace(dim, minimum=min(dim.minimum, seen.get(dim.name, dim.minimum))) for dim in graph.traced.dims
    )


def _verify_packed(
    graph: Graph, path: Path, tolerance: Tolerance, seed: int, provider: str, settings: ComparisonSettings
) -> tuple[Report, tuple[Dim, ...]]:
    """Compare a graph with packed weights in two steps, each as tightly as any graph; results as of `verify_graph`.

    The float graph that the weights were packed in is the model. The packed graph is that float graph with other
    weights: those that the packed ones stand for, computed anew from the model's. What packing does to the model is
    another question (`packing_effect`).
    """
    quantized = graph.quantized
    assert quantized is not None
    with TemporaryDirectory(prefix="moe-export-") as folder:
        floats = written(quantized.floats, Path(folder, "floats.onnx"))
        plain = replace(graph, model=quantized.floats, quantized=None)
        report, dims = verify_graph(
            plain, floats, tolerance=tolerance, seed=seed, provider=provider, settings=settings
        )
        if report.exit_code:
            return replace(
                report, about={**report.about, PART: "the graph before its weights were packed"}
            ), dims
        example, sizes = _as_given(graph)
        packed = verify_file(
            runner_of(path, provider, running_type(path, graph.dtype)),
            graph.reference,
            example=example,
            dims=[replace(dim, traced=sizes[dim.name]) for dim in dims],
            routing=graph.routing,
            tolerance=tolerance_of(graph.dtype, tolerance),
            seed=seed,
            graph=path,
            provider=provider,
            settings=settings,
            domain=Domain(graph.traced.conditions),
            stand_in=StandIn.of(quantized, Path(folder), provider),
        )
    return packed, dims if packed.exit_code == 0 else graph.traced.dims


def _as_given(graph: Graph) -> tuple[Mapping[str, torch.Tensor], dict[str, int]]:
    """The user's own example and its sizes; the traced example where the graph does not accept the user's."""
    traced = graph.traced
    own = {name: graph.reference.inputs[name] for name in traced.example if name in graph.reference.inputs}
    sizes = {
        size: got
        for name, tensor in own.items()
        for size, got in zip(traced.inputs[name], tensor.shape, strict=False)
        if isinstance(size, str) and size.isidentifier()
    }
    known = sizes.keys() == {dim.name for dim in traced.dims}
    fits = (known and own.keys() == traced.example.keys()) and all(
        tensor.dtype == traced.example[name].dtype
        and tuple(tensor.shape) == shape_at(TensorSpec(name, "", tuple(traced.inputs[name])), sizes)
        for name, tensor in own.items()
    )
    if not fits:
        return traced.example, {dim.name: dim.traced for dim in traced.dims}
    return own, sizes


def _with_the_same_experts(
    graph: Graph, report: Report, tolerance: Tolerance, seed: int, provider: str
) -> Report | None:
    """Compare a half-precision graph with its float32 form, both made to take the same experts.

    Half precision may choose other experts than the model, so its outputs alone decide nothing. The float32 form is
    compared with the model first. A choice that differs must be between experts whose scores are within the tolerance.

    Returns:
        The report, that of the float32 form if that is not equal to the model; None if the graph chooses nothing.
    """
    assert graph.wide is not None
    found = replaying_and_chooser(graph.wide, graph.model, provider)
    if found is None:
        return None
    replaying, chooser, wide = found
    dims = [replace(dim, minimum=min(dim.minimum, 1)) for dim in graph.traced.dims]
    float32 = verify_file(
        wide,
        graph.reference,
        example=graph.traced.example,
        dims=dims,
        routing=graph.routing,
        tolerance=Tolerance(),
        seed=seed,
    )
    if float32.exit_code:
        return float32
    taken = [spec for spec in chooser.inputs if spec.name in graph.traced.example]
    return compare(
        replaying,
        chooser,
        cases(
            taken,
            [DimRange(dim.name, dim.traced, dim.minimum, dim.maximum) for dim in dims],
            {spec.name: as_numpy(graph.traced.example[spec.name]) for spec in taken},
            seed,
        ),
        tolerance=tolerance,
        routing=[RoutingPair(made, None, score) for made, score in replaying.pairs],
    )


def verify_file(  # noqa: PLR0913  each has a name
    candidate: GraphRunner,
    reference: Subject,
    *,
    example: Mapping[str, torch.Tensor],
    dims: Sequence[Dim],
    routing: Routing,
    tolerance: Tolerance,
    seed: int,
    outputs: Sequence[str] | None = None,
    graph: Path | None = None,
    provider: str = "cpu",
    settings: ComparisonSettings = DEFAULT_SETTINGS,
    recorder: Recorder | None = None,
    about: Mapping[str, str] | None = None,
    narrow: str = "float32",
    domain: Domain | None = None,
    limits: Mapping[str, tuple[Array, Array]] | None = None,
    stand_in: StandIn | None = None,
) -> Report:
    """Compare a graph with a model whose inputs have the same names.

    Args:
        candidate: The graph.
        reference: The model.
        example: Example inputs by the graph's names, of the sizes in `dims`.
        dims: The graph's dynamic dimensions.
        routing: Outputs that are expert indices, each with the output of its weights and that of its scores, if any.
        tolerance: For floats.
        seed: Of the inputs.
        outputs: The reference's outputs under the graph's names; its own names if None.
        graph: The candidate's file, if it is an ONNX graph that can replay the reference's choices.
        provider: Where onnxruntime replays them, `cpu` or `cuda`.
        settings: How much to try.
        recorder: Records the reference's inputs and outputs for a golden file.
        about: Facts for the report.
        narrow: The narrowest type that the candidate computes in.
        domain: The sizes that the candidate claims to be right for, besides the bounds of `dims`; None for all.
        limits: The least and greatest values of inputs that decide the shapes of an engine.
        stand_in: What is right in the place of the model, which then only says what its inputs mean.

    Raises:
        UsageError: The settings name a case that does not exist, or the user's own inputs do not fit.
    """
    specs = [
        TensorSpec(spec.name, spec.dtype, spec.shape)
        for spec in sorted(candidate.inputs, key=lambda spec: list(example).index(spec.name))
    ]
    ranges = [DimRange(dim.name, dim.traced, dim.minimum, dim.maximum) for dim in dims]
    arrays = {name: as_numpy(tensor) for name, tensor in example.items() if name in {s.name for s in specs}}
    names = outputs or reference.outputs
    model = apart.reference(reference, names)
    runner, truth = (model, None) if stand_in is None else (stand_in.runner, stand_in.truth)
    with quiet():
        known = known_of_model(reference, specs, ranges, arrays, seed, graph, domain)
    known = replace(known, limits=limits or {})
    made = comparison_cases(settings, specs, ranges, arrays, seed, runner, known)
    pairs = [RoutingPair(*pair) for pair in routing]
    watched, watched_cases = recorded(recorder, runner, made, pairs)
    with quiet():
        report = compare(
            watched,
            candidate,
            watched_cases,
            tolerance=tolerance,
            routing=pairs,
            budget=settings.flips,
            time_limit=settings.time_limit,
            truth=truth or apart.reference(reference, names, apart.FLOAT64),
            replayer=GraphReplayer(runner, graph, provider),
            about=about,
            narrow=narrow,
            rounded=None if narrow == "float32" else apart.reference(reference, names, narrow),
        )
        if isinstance(reference.module, DecoderModule) and stand_in is None:
            return with_decoding(report, candidate, reference, tolerance, seed)
        return report
