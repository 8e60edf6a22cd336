"""The sides that decide what ordinary runs leave open: the model in float64, and a graph told the model's choices."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from moe_export.checking_choices import runner_of_model
from moe_export.errors import MoeExportError
from moe_export.export.precision_choices import Choices, find_choices, with_forced_choices
from moe_export.export.subject import Subject
from moe_export.verify import Array, OnnxRuntimeRunner, Told, TorchRunner


class Float64Runner:
    """A model in float64; its weights are copied when it is first asked."""

    name = "torch-float64"

    def __init__(self, subject: Subject, outputs: Sequence[str]) -> None:
        self._subject, self._outputs = subject, outputs
        self._runner: TorchRunner | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; float inputs are cast, and float outputs are float64."""
        if self._runner is None:
            wide = replace(self._subject, module=copy.deepcopy(self._subject.module).double())
            self._runner = TorchRunner(wide.call_named, self._outputs, self.name, "float64")
        return self._runner.run(inputs)


class GraphTeller:
    """Runs a graph under the choices that the model makes on the same inputs.

    The graph's `TopK`s are the model's `topk`s in the same order; where they are not as many, it cannot be told.

    Args:
        model: The model.
        path: The graph; None for what cannot be told, as an engine.
        provider: Where onnxruntime runs.
        known: Names of the graph's inputs that the model has.
    """

    def __init__(self, model: TorchRunner, path: Path | None, provider: str = "cpu") -> None:
        self._model, self._path, self._provider = model, path, provider
        self._graph: OnnxRuntimeRunner | None = None
        self._choices = Choices(0)

    def tell(self, inputs: Mapping[str, Array]) -> Told | None:
        """One case again; None if the model chooses nothing or refuses the inputs."""
        try:
            expected, choices = self._model.run_watched(inputs)
        except Exception:  # what the model raises is judged where it is run for its own sake
            return None
        if not choices:
            return None
        graph = self._told_graph()
        if graph is None or self._choices.count != len(choices):
            return Told(expected, None, choices)
        forced = dict(zip(self._choices.forced, (choice.ids for choice in choices), strict=True))
        try:
            got = graph.run({**inputs, **_shaped(forced, graph)})
        except MoeExportError:
            return Told(expected, None, choices)
        own = tuple(got.pop(name) for name in self._choices.made)
        for name in self._choices.scores:
            got.pop(name)
        if any(mine.size != choice.ids.size for mine, choice in zip(own, choices, strict=True)):
            return Told(expected, None, choices)
        return Told(expected, got, choices, own)

    def _told_graph(self) -> OnnxRuntimeRunner | None:
        if self._graph is None and self._path is not None:
            model = ir.load(self._path)
            self._choices = Choices(len(find_choices(model)))
            if self._choices.count:
                self._graph = runner_of_model(with_forced_choices(model), self._provider)
        return self._graph


def _shaped(forced: Mapping[str, Array], graph: OnnxRuntimeRunner) -> dict[str, Array]:
    """The choices in the rank that the graph has them in: (batch, seq, k) for (tokens, k)."""
    ranks = {spec.name: len(spec.shape) for spec in graph.inputs}
    return {
        name: np.asarray(ids.reshape(-1, ids.shape[-1]) if ranks[name] == 2 else ids, np.int64)
        for name, ids in forced.items()
    }
