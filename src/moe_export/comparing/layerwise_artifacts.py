"""`verify GRAPH --against MODEL`, where the model's weights do not fit in memory, or block by block was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from moe_export.comparing.artifacts import Artifact, metadata
from moe_export.comparing.matching import match_graph, reference_of
from moe_export.comparing.request import Request
from moe_export.comparison_settings import tolerance_of
from moe_export.errors import UsageError
from moe_export.export.frontend.subject import Subject
from moe_export.large.layerwise import verify_blocks
from moe_export.verify import Report, TensorSpec
from moe_export.verify.runners.onnxruntime_runner import specs_of


@dataclass(frozen=True)
class Declared:
    """A graph as its file declares it, without an engine that has loaded it."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def by_blocks(subject: Subject, candidate: Artifact, asked: str | None) -> bool:
    """Whether a graph is compared with a model block by block."""
    if candidate.kind != "graph" or metadata(candidate.path).get("moe_export.kind", "model") != "model":
        return False
    absent = subject.weights is not None and subject.weights.absent
    return asked == "layers" or (absent and asked is None)


def compare_blocks(subject: Subject, candidate: Artifact, request: Request, called: str) -> Report:
    """Compare a graph with a model block by block.

    Raises:
        UsageError: The graph cannot be read, takes other inputs, or another engine than onnxruntime's CPU was named.
    """
    if (candidate.backend or "onnxruntime-cpu") != "onnxruntime-cpu":
        raise UsageError(
            f"block by block, graphs are run by onnxruntime on the CPU, not by {candidate.backend}",
            hint="--memory with more bytes than the weights have compares the whole",
        )
    facts = metadata(candidate.path)
    declared = _declared(candidate.path)
    held = reference_of(subject, declared, facts, request.gate)  # type: ignore[arg-type]  # it is asked for names only
    matched = match_graph(declared, held.subject, held.routing)  # type: ignore[arg-type]  # likewise
    return verify_blocks(
        candidate.path,
        matched.subject,
        matched.example,
        matched.dims,
        tolerance_of(request.dtype, request.tolerance),
        request.seed,
        about={"candidate": candidate.text, "reference": called},
    )


def _declared(path: Path) -> Declared:
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:
        raise UsageError(f"{path} is no ONNX model: {error}") from error
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    return Declared(str(path), specs_of(inputs), specs_of(graph.output))
