"""`verify GRAPH --against MODEL` block by block: the model's weights do not fit in memory, or the user asked for it."""

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
    """A graph's name, inputs and outputs as its file declares them, read without loading it into an engine."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def by_blocks(subject: Subject, candidate: Artifact, asked: str | None) -> bool:
    """Whether a candidate is compared with a model block by block.

    Only a graph of a whole model can be. It is where the user asked for `layers`, or asked for nothing and the model's
    weights are not in memory.
    """
    if candidate.kind != "graph" or metadata(candidate.path).get("moe_export.kind", "model") != "model":
        return False
    absent = subject.weights is not None and subject.weights.absent
    return asked == "layers" or (absent and asked is None)


def compare_blocks(subject: Subject, candidate: Artifact, request: Request, called: str) -> Report:
    """Compare a graph with a model block by block.

    Raises:
        UsageError: The graph cannot be read or takes other inputs, or its backend is not onnxruntime on the CPU.
    """
    if (candidate.backend or "onnxruntime-cpu") != "onnxruntime-cpu":
        raise UsageError(
            f"block by block, graphs are run by onnxruntime on the CPU, not by {candidate.backend}",
            hint="with --memory larger than the weights, the graph is compared as a whole",
        )
    facts = metadata(candidate.path)
    declared = _declared(candidate.path)
    # both read only the names and shapes that `Declared` has
    counterpart = reference_of(subject, declared, facts, request.gate)  # type: ignore[arg-type]
    matched = match_graph(declared, counterpart.subject, counterpart.routing)  # type: ignore[arg-type]
    report, _ = verify_blocks(
        candidate.path,
        matched.subject,
        matched.example,
        matched.dims,
        tolerance_of(request.dtype, request.tolerance),
        request.seed,
        about={"candidate": candidate.text, "reference": called},
    )
    return report


def _declared(path: Path) -> Declared:
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:
        raise UsageError(f"{path} is not an ONNX model: {error}") from error
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    return Declared(str(path), specs_of(inputs), specs_of(graph.output))
