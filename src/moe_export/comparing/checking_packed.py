"""The graph that one with packed weights is held against: in float, with the weights that the packed ones stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from moe_export.comparing.checking_replay import WatchedGraph
from moe_export.export.onnx.serialize import write_model
from moe_export.export.quantize.quantize import Quantized
from moe_export.verify import Array
from moe_export.verify.float64_graph import run_in_float64


class Float64Graph:
    """A graph that runs in float64.

    Args:
        path: The ONNX file.
    """

    name = "the float graph in float64"

    def __init__(self, path: Path) -> None:
        self._model = onnx.load(path)
        self._outputs = [value.name for value in self._model.graph.output]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; floats come back as float64."""
        return dict(zip(self._outputs, run_in_float64(self._model, inputs), strict=True))


@dataclass(frozen=True)
class StandIn:
    """What is right by definition in the place of the model.

    Attributes:
        runner: Runs it, and says which experts it chooses.
        truth: The same in float64.
    """

    runner: WatchedGraph
    truth: Float64Graph

    @classmethod
    def of(cls, quantized: Quantized, folder: Path, provider: str) -> StandIn:
        """The float graph with weights that were put on their grid anew, from the model's own.

        Args:
            quantized: What was packed.
            folder: Where the graph is written, for as long as it is used.
            provider: Where onnxruntime runs, `cpu` or `cuda`.
        """
        path = written(quantized.exact, folder / "exact.onnx")
        runner = WatchedGraph(path, provider)
        runner.name = "the float graph with the weights that the packed ones stand for"
        return cls(runner, Float64Graph(path))


def written(model: ir.Model, path: Path) -> Path:
    """Write a graph, which stays as it is; its path."""
    write_model(model.clone(), path)
    return path
