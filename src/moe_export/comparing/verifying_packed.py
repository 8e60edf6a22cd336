"""Compare a graph with packed weights with its model: the graph is exported anew, to know what it has to compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from moe_export.comparing.artifacts import Artifact
from moe_export.comparing.checking import verify_graph
from moe_export.comparing.checking_packed import StandIn
from moe_export.comparing.layerwise_artifacts import by_blocks, compare_blocks
from moe_export.comparing.localising import OPTIONS, is_of, remembered_options
from moe_export.comparing.request import Request
from moe_export.errors import UsageError
from moe_export.export.frontend.subject import Subject
from moe_export.export.pipeline import Graph, export_subject
from moe_export.export.tracing.trace import quiet
from moe_export.export.weights.lazy import in_memory
from moe_export.large.packed_weights import STANDS_FOR, packed_values
from moe_export.verify import Report
from moe_export.verify.runners.onnxruntime_runner import OnnxRuntimeRunner

_FLOAT = "float32"


def is_packed(facts: Mapping[str, str]) -> bool:
    """Whether a graph's metadata say that its weights are packed."""
    return bool(json.loads(facts.get(OPTIONS, "{}")).get("weights_dtype", _FLOAT) != _FLOAT)


def compare_packed(
    original: Subject, candidate: Artifact, request: Request, facts: Mapping[str, str], called: str
) -> Report:
    """Compare a packed graph with the model that it was made from, as an export does (`checking`).

    Args:
        original: The model.
        candidate: The graph.
        request: How to compare.
        facts: The graph's metadata.
        called: What the report calls the model.

    Raises:
        UsageError: The model has other inputs than the graph, or cannot be compared block by block.
    """
    graph = _exported_anew(original, facts)
    if by_blocks(original, candidate, request.how):
        with packed_values(original.weights, graph.quantized) as replaced:
            if not replaced:
                raise UsageError(
                    f"{candidate.text} has packed weights that were made of several of the model's",
                    hint="--compare whole, if there is memory for the weights in float",
                )
            report = compare_blocks(original, candidate, request, called)
        return replace(report, reference=STANDS_FOR)
    taken = {spec.name for spec in OnnxRuntimeRunner(candidate.path, candidate.provider).inputs}
    if not taken <= graph.traced.example.keys():
        raise UsageError(
            f"{candidate.text} takes {', '.join(sorted(taken))}, and the model now {', '.join(graph.traced.example)}",
            hint="a graph with packed weights is compared with a new export of its model: export it again",
        )
    with in_memory(graph.reference.module):
        report, _ = verify_graph(
            graph,
            candidate.path,
            tolerance=request.tolerance,
            seed=request.seed,
            provider=candidate.provider,
            settings=request.settings,
        )
    return replace(report, about={**report.about, "candidate": candidate.text, "reference": called})


def stand_in_of(original: Subject, facts: Mapping[str, str]) -> StandIn:
    """What a packed graph has to compute, from a new export of its model.

    Args:
        original: The model.
        facts: The graph's metadata.
    """
    quantized = _exported_anew(original, facts).quantized
    assert quantized is not None  # the metadata say so
    with TemporaryDirectory(prefix="moe-export-") as folder:
        return StandIn.of(quantized, Path(folder), "cpu")


def _exported_anew(subject: Subject, facts: Mapping[str, str]) -> Graph:
    kind, path = facts.get("moe_export.kind", "model"), facts.get("moe_export.module", "")
    with quiet():
        graphs = export_subject(subject, remembered_options(facts, int(facts.get("moe_export.opset", "17"))))
    return next(graph for graph in graphs if is_of(graph, kind, path))
