"""`moe-export verify graph.onnx --against model.py`: the gate alone, for a graph of whatever origin."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch

from moe_export.checking import Routing, tolerance_of, verify_file
from moe_export.checking_choices import runner_of
from moe_export.console import Console
from moe_export.engine_running import graph_of, is_engine, open_engine
from moe_export.errors import MoeExportError, UsageError
from moe_export.export.dims import Dim
from moe_export.export.gate import INDICES, SCORES, WEIGHTS, gate_subject
from moe_export.export.load import load_subject
from moe_export.export.routing import find_routings, routing_outputs
from moe_export.export.subject import Subject
from moe_export.export.trace import trace
from moe_export.verify import OnnxRuntimeRunner, TensorRtRunner, TensorSpec, Tolerance, show


def run_verify(
    graph: str,
    against: str,
    init: tuple[str, ...],
    inputs: tuple[str, ...],
    rtol: float | None,
    atol: float | None,
    seed: int,
    provider: str,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> int:
    """Run the command; the exit code."""
    console = Console(quiet, as_json)
    tolerance = Tolerance(rtol, atol)
    path = Path(graph)
    facts = _metadata((graph_of(path) or path) if is_engine(path) else path)
    dtype = facts.get("moe_export.dtype", "float32")
    candidate = open_engine(path) if is_engine(path) else runner_of(path, provider, dtype)
    tolerance = tolerance_of(dtype, tolerance)
    with console.user_code():
        with console.step(f"loading {against}"):
            subject = load_subject(against, init=init, inputs=inputs)
        with console.step("tracing"):
            reference, routing = _reference(subject, facts)
        reference, routing = _aligned(candidate, reference, routing)
        example = _example_for(candidate, reference)
        with console.step(f"verifying {graph}"):
            report = verify_file(
                candidate,
                reference,
                example=example,
                dims=_within(_dims(candidate.inputs, example), candidate),
                routing=routing,
                tolerance=tolerance,
                seed=seed,
            )
    console.json(json.dumps(report.to_dict(), indent=2))
    if not (quiet or as_json):
        show(report, sys.stdout)
    return report.exit_code


Candidate = OnnxRuntimeRunner | TensorRtRunner


def _within(dims: list[Dim], candidate: Candidate) -> list[Dim]:
    """The dimensions within what an engine's profile takes."""
    if not isinstance(candidate, TensorRtRunner):
        return dims
    taken = {dim.name: dim for dim in candidate.dims}
    return [replace(dim, minimum=taken[dim.name].minimum, maximum=taken[dim.name].maximum) for dim in dims]


def _metadata(path: Path) -> dict[str, str]:
    if is_engine(path):
        return {}  # an engine without its graph beside it
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # whoever runs the file says what is wrong with it
        return {}
    return {entry.key: entry.value for entry in model.metadata_props}


def _reference(subject: Subject, facts: Mapping[str, str]) -> tuple[Subject, Routing]:
    """The model, or the gate of it that the graph says it is; and which outputs are expert indices.

    What the indices are is read off the model's own trace, never off the graph in question.
    """
    is_gate = facts.get("moe_export.kind") == "gate"
    try:
        traced = trace(subject)
        routings = find_routings(traced)
    except MoeExportError:
        if is_gate:
            raise
        return subject, ()  # a model that cannot be traced can still be compared, index for index
    if not is_gate:
        return subject, [pair for routing in routings for pair in routing_outputs(routing, traced)]
    path = facts.get("moe_export.module", "")
    for routing in routings:
        if routing.path == path:
            cut = gate_subject(traced, routing, subject, with_scores=True)
            return cut, [(INDICES, WEIGHTS if WEIGHTS in cut.outputs else None, SCORES)]
    raise UsageError(
        f"the graph is the gate of module {path!r}, and the model has no gate there",
        hint="the gates of the model: " + (", ".join(routing.path for routing in routings) or "none"),
    )


def _aligned(candidate: Candidate, reference: Subject, routing: Routing) -> tuple[Subject, Routing]:
    """The model under the graph's names: a graph of another exporter has its own, in the model's order.

    Where one side has more inputs or outputs than the other, nothing is matched by position.
    """
    inputs = _by_position([spec.name for spec in candidate.inputs], list(reference.inputs))
    outputs = _by_position([spec.name for spec in candidate.outputs], list(reference.outputs))
    renamed = replace(
        reference,
        inputs=dict(zip(inputs, reference.inputs.values(), strict=True)),
        outputs=tuple(outputs),
    )
    names = dict(zip(reference.outputs, outputs, strict=True))
    pairs = [tuple(names.get(name, name) if name else None for name in pair) for pair in routing]
    return renamed, pairs  # type: ignore[return-value]


def _by_position(graph: list[str], model: list[str]) -> list[str]:
    """The graph's names in place of the model's, if they are as many and not the same set."""
    return model if len(graph) != len(model) or set(graph) == set(model) else graph


def _example_for(candidate: Candidate, reference: Subject) -> dict[str, torch.Tensor]:
    """The model's example inputs for the graph's inputs, which must have their names.

    An input of the model that the graph does not have is one that its outputs do not depend on; it stays at
    its example value.
    """
    names = [spec.name for spec in candidate.inputs]
    unknown = [name for name in names if name not in reference.inputs]
    if unknown:
        raise UsageError(
            f"the graph takes {', '.join(names)}, but the model takes {', '.join(reference.inputs)}",
            hint="name the graph's inputs as forward's parameters are named",
        )
    return {name: tensor for name, tensor in reference.inputs.items() if name in names}


def _dims(specs: tuple[TensorSpec, ...], example: Mapping[str, torch.Tensor]) -> list[Dim]:
    """The graph's dynamic dimensions, with the example's sizes.

    Raises:
        UsageError: A fixed size of the graph is not the example's.
    """
    found: dict[str, Dim] = {}
    for spec in specs:
        sizes: tuple[Any, ...] = tuple(example[spec.name].shape)
        fits = len(sizes) == len(spec.shape) and all(
            isinstance(want, str) or want == size for want, size in zip(spec.shape, sizes, strict=True)
        )
        if not fits:
            raise UsageError(
                f"the graph takes {spec}, but the model's example has shape {list(sizes)}",
                hint="give the model file example inputs of the sizes that the graph was exported for",
            )
        for want, size in zip(spec.shape, sizes, strict=True):
            if isinstance(want, str) and re.fullmatch(r"[A-Za-z_]\w*", want):
                found.setdefault(want, Dim(want, want, size, 1, None))
    return list(found.values())
