"""A model under the names and sizes of its graph: the start of every comparison of the two."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_export.comparing.artifacts import GraphRunner
from moe_export.comparing.checking import Routing
from moe_export.comparing.renaming import by_position
from moe_export.domain import Domain
from moe_export.errors import MoeExportError, UsageError
from moe_export.export.decoder.decoder import decoder_of
from moe_export.export.engines.profiles import parse_bounds
from moe_export.export.frontend.subject import Subject
from moe_export.export.gates.gate import INDICES, SCORES, WEIGHTS, gate_subject
from moe_export.export.gates.routing import find_routings, routing_outputs
from moe_export.export.onnx.simplify import as_numpy
from moe_export.export.tracing.dims import Dim
from moe_export.export.tracing.trace import quiet, trace
from moe_export.verify import Array, DimRange, RoutingPair, TensorRtRunner, TensorSpec
from moe_export.verify.reports.findings import PART


@dataclass(frozen=True, eq=False)
class Matched:
    """A model, or a gate of it, under a graph's names.

    Attributes:
        subject: The model; its inputs and outputs have the graph's names.
        routing: Outputs that are expert indices, with their weights and scores.
        example: The model's example inputs for the graph's inputs.
        dims: The graph's dynamic dimensions, with the example's sizes, within the range of an engine's profile.
    """

    subject: Subject
    routing: Routing
    example: Mapping[str, torch.Tensor]
    dims: Sequence[Dim]

    @property
    def pairs(self) -> list[RoutingPair]:
        """The routing in the verify room's type."""
        return [RoutingPair(*pair) for pair in self.routing]

    @property
    def ranges(self) -> list[DimRange]:
        """The dimensions in the verify room's type."""
        return [DimRange(dim.name, dim.traced, dim.minimum, dim.maximum) for dim in self.dims]

    @property
    def arrays(self) -> dict[str, Array]:
        """The example as arrays."""
        return {name: as_numpy(tensor) for name, tensor in self.example.items()}


def match_graph(
    runner: GraphRunner, subject: Subject, routing: Routing = (), facts: Mapping[str, str] | None = None
) -> Matched:
    """Rename a model's inputs and outputs to those of a graph.

    A graph of another exporter has names of its own, in the model's order, so names are matched by position; never
    where one side has more inputs or outputs than the other.

    Args:
        runner: The graph, or the engine.
        subject: The model or gate that it computes.
        routing: Outputs of the model that are expert indices, with those of their weights and scores.
        facts: The graph's metadata, with the range of each dimension that it is right for.

    Raises:
        UsageError: The graph takes other inputs than the model, or fixes sizes that are not the example's.
    """
    inputs = by_position(list(subject.inputs), [spec.name for spec in runner.inputs])
    names = by_position(subject.outputs, [spec.name for spec in runner.outputs])
    renamed = replace(
        subject,
        inputs={inputs[name]: tensor for name, tensor in subject.inputs.items()},
        outputs=tuple(names.values()),
    )
    pairs = [tuple(names.get(name, name) if name else None for name in pair) for pair in routing]
    example = _example(runner, renamed)
    dims = _within(_stated(_dims(runner.inputs, example), facts or {}), runner)
    return Matched(renamed, pairs, example, dims)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Reference:
    """What a graph is compared with.

    Attributes:
        subject: The model, or a gate of it.
        routing: Outputs that are expert indices, with those of their weights and scores.
        part: The part of the model, in words, if it is not the whole.
    """

    subject: Subject
    routing: Routing
    part: str = ""

    @property
    def about(self) -> dict[str, str]:
        """The part, as a fact for the report; empty for the whole model."""
        return {PART: self.part} if self.part else {}


def reference_of(
    subject: Subject, runner: GraphRunner, facts: Mapping[str, str], gate: str | None = None
) -> Reference:
    """The model, or a gate of it; and which outputs are expert indices.

    The user names the gate. The graph's own metadata count only where its inputs and outputs are not the model's: a
    graph never chooses what it is compared with. The expert indices are found in the model's trace, not in the graph;
    where no output can be indices, nothing is traced.

    Args:
        subject: The model.
        runner: The graph.
        facts: The graph's metadata.
        gate: The module whose gate the graph is, if the user named one.

    Raises:
        UsageError: The model has no such gate.
    """
    if facts.get("moe_export.kind") == "decoder" and not is_whole(runner, subject):
        return Reference(decoder_of(subject).subject, (), "the model with a cache, as its decoder")
    claimed = facts.get("moe_export.module", "") if facts.get("moe_export.kind") == "gate" else None
    path = gate if gate is not None else None if claimed is None or is_whole(runner, subject) else claimed
    if path is None and not _may_be_indices(_results(subject)):
        return Reference(subject, ())
    try:
        traced = trace(subject)
        routings = find_routings(traced)
    except MoeExportError:
        if path is not None:
            raise
        return Reference(subject, ())  # a model that cannot be traced can still be compared, index for index
    if path is None:
        return Reference(subject, [pair for routing in routings for pair in routing_outputs(routing, traced)])
    for routing in routings:
        if routing.path == path:
            cut = gate_subject(traced, routing, subject, with_scores=True)
            pairs = [(INDICES, WEIGHTS if WEIGHTS in cut.outputs else None, SCORES)]
            return Reference(cut, pairs, f"the gate of {path} alone, not the model")
    raise UsageError(
        f"the model has no gate in module {path!r}",
        hint="the gates of the model: " + (", ".join(routing.path for routing in routings) or "none"),
    )


def is_whole(runner: GraphRunner, subject: Subject) -> bool:
    """Whether a graph's inputs and outputs have the dtypes and shapes of the whole model's; names may differ."""
    inputs, outputs = list(runner.inputs), list(runner.outputs)
    names = by_position([spec.name for spec in inputs], list(subject.inputs))
    own = {name: subject.inputs[name] for name in names.values() if name in subject.inputs}
    if len(own) < len(inputs) or len(outputs) != len(subject.outputs):
        return False
    made = dict(zip(subject.outputs, _results(subject), strict=True))
    wanted = by_position([spec.name for spec in outputs], subject.outputs)
    return all(_fits(spec, own[names[spec.name]]) for spec in inputs) and all(
        _fits(spec, made[wanted[spec.name]]) for spec in outputs
    )


def _results(subject: Subject) -> Sequence[torch.Tensor]:
    """What a model returns for its example."""
    with torch.no_grad(), quiet():
        return subject.call([tensor.clone() for tensor in subject.inputs.values()])


def _may_be_indices(results: Sequence[torch.Tensor]) -> bool:
    """Whether one of them has whole numbers only, be they floats.

    Elsewhere no output is expert indices, and no trace has to say which: that takes three quarters of the time in which
    a model of 24 layers is verified.
    """
    return any(
        not result.is_complex() and (not result.is_floating_point() or torch.equal(result, result.round()))
        for result in results
    )


def _fits(spec: TensorSpec, tensor: torch.Tensor) -> bool:
    """Whether a tensor has the dtype and rank of a graph's value, and its sizes where the graph fixes them."""
    sizes = zip(spec.shape, tensor.shape, strict=False)
    return (
        spec.dtype == str(tensor.dtype).removeprefix("torch.")
        and len(spec.shape) == tensor.dim()
        and all(isinstance(want, str) or want == size for want, size in sizes)
    )


def _example(runner: GraphRunner, subject: Subject) -> dict[str, torch.Tensor]:
    """The model's example for the inputs that the graph has, by name.

    The graph may lack an input that no output depends on; the model gets its example value for that.
    """
    names = [spec.name for spec in runner.inputs]
    unknown = [name for name in names if name not in subject.inputs]
    if unknown:
        raise UsageError(
            f"the graph takes {', '.join(names)}, but the model takes {', '.join(subject.inputs)}",
            hint="name the graph's inputs as forward's parameters are named",
        )
    return {name: tensor for name, tensor in subject.inputs.items() if name in names}


def _dims(specs: Sequence[TensorSpec], example: Mapping[str, torch.Tensor]) -> list[Dim]:
    found: dict[str, Dim] = {}
    for spec in specs:
        sizes: tuple[Any, ...] = tuple(example[spec.name].shape)
        fits = len(sizes) == len(spec.shape) and all(
            isinstance(want, str) or want == size for want, size in zip(spec.shape, sizes, strict=True)
        )
        if not fits:
            raise UsageError(
                f"the graph takes {spec}, but the model's example has shape {list(sizes)}",
                hint="give the model file example inputs with the sizes that the graph was exported for",
            )
        for want, size in zip(spec.shape, sizes, strict=True):
            if isinstance(want, str) and re.fullmatch(r"[A-Za-z_]\w*", want):
                found.setdefault(want, Dim(want, want, size, 1, None))
    return list(found.values())


def stated_domain(facts: Mapping[str, str]) -> Domain:
    """The sizes that a graph's metadata claim it is right for, besides the bounds of its dimensions.

    Raises:
        UsageError: A condition cannot be parsed.
    """
    text = facts.get("moe_export.domain", "")
    return Domain.of(text) if text else Domain()


def _stated(dims: list[Dim], facts: Mapping[str, str]) -> list[Dim]:
    """The dimensions with the bounds in the graph's metadata; bounds that exclude the example are ignored."""
    found = []
    for dim in dims:
        bounds = parse_bounds(facts.get(f"moe_export.dim.{dim.name}", ""))
        if bounds[0] <= dim.traced <= (bounds[1] or dim.traced):
            dim = replace(dim, minimum=bounds[0], maximum=bounds[1])  # noqa: PLW2901
        found.append(dim)
    return found


def _within(dims: list[Dim], runner: GraphRunner) -> list[Dim]:
    """The dimensions with the bounds of an engine's profile; those of a graph unchanged."""
    if not isinstance(runner, TensorRtRunner):
        return dims
    taken = {dim.name: dim for dim in runner.dims}
    return [replace(dim, minimum=taken[dim.name].minimum, maximum=taken[dim.name].maximum) for dim in dims]
