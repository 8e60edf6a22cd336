"""Routing replay: a graph run with the choices of experts that another artifact made, so that ties do not count."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from moe_export.comparing.artifacts import Artifact
from moe_export.errors import MoeExportError
from moe_export.export.precision.choices import (
    Choices,
    find_choices,
    with_choices_out,
    with_forced_choices,
)
from moe_export.running.choices import runner_of_model
from moe_export.verify import Array, Choice, OnnxRuntimeRunner, Replay, Runner
from moe_export.verify.golden import Recorder
from moe_export.verify.inputs.experts_alone import Watched
from moe_export.verify.runners.openvino_runner import OpenVinoRunner


class WatchedGraph:
    """A graph as a runner that also returns its choices of experts.

    Args:
        path: The ONNX file.
        provider: Where onnxruntime runs it, `cpu` or `cuda`.
    """

    def __init__(self, path: Path, provider: str = "cpu") -> None:
        model = ir.load(path)
        self._choices = Choices(len(find_choices(model)))
        self._makes = runner_of_model(with_choices_out(model), provider)
        self.name = self._makes.name
        self._replaying = runner_of_model(with_forced_choices(model), provider)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; return the outputs alone."""
        return self.run_watched(inputs)[0]

    def run_watched(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[Choice, ...]]:
        """Run once; return the outputs, and the choices in the order of the graph's `TopK`s."""
        outputs = self._makes.run(inputs)
        ids = [outputs.pop(name) for name in self._choices.made]
        if not ids:
            return outputs, ()
        replayed = self._replaying.run({**inputs, **dict(zip(self._choices.forced, ids, strict=True))})
        scores = [replayed[name] for name in self._choices.scores]
        return outputs, tuple(Choice(i, s) for i, s in zip(ids, scores, strict=True))


class GraphReplayer:
    """Runs a graph with the choices that the reference makes on the same inputs.

    The graph's `TopK`s correspond to the reference's choices in order; nothing is replayed if there are more or fewer.

    Args:
        reference: The runner whose choices count.
        path: The graph; None for what cannot replay choices, such as an engine.
        provider: Where onnxruntime runs, `cpu` or `cuda`.
        renamed: The graph's output names → the reference's, where they differ.
    """

    def __init__(
        self,
        reference: Watched,
        path: Path | None,
        provider: str = "cpu",
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        self._reference, self._path, self._provider = reference, path, provider
        self._renamed = renamed or {}
        self._graph: OnnxRuntimeRunner | OpenVinoRunner | None = None
        self._choices = Choices(0)

    def replay(self, inputs: Mapping[str, Array]) -> Replay | None:
        """Run one case again; None if the reference chooses nothing or refuses the inputs.

        `got` of the result is None if the graph cannot replay the choices.
        """
        try:
            expected, choices = self._reference.run_watched(inputs)
        except Exception:  # a reference that raises is reported by its own run, not here
            return None
        if not choices:
            return None
        graph = self._replaying_graph()
        if graph is None or self._choices.count != len(choices):
            return Replay(expected, None, choices)
        forced = dict(zip(self._choices.forced, (choice.ids for choice in choices), strict=True))
        try:
            got = graph.run({**inputs, **_shaped(forced, graph)})
        except MoeExportError:
            return Replay(expected, None, choices)
        own = tuple(got.pop(name) for name in self._choices.made)
        scores = tuple(got.pop(name) for name in self._choices.scores)
        # as many choices, but not the same ones: another k, or other tokens
        if any(mine.size != choice.ids.size for mine, choice in zip(own, choices, strict=True)):
            return Replay(expected, None, choices)
        return Replay(
            expected,
            {self._renamed.get(name, name): array for name, array in got.items()},
            choices,
            own,
            scores,
        )

    def _replaying_graph(self) -> OnnxRuntimeRunner | OpenVinoRunner | None:
        if self._graph is None and self._path is not None:
            model = ir.load(self._path)
            self._choices = Choices(len(find_choices(model)))
            if self._choices.count:
                self._graph = runner_of_model(with_forced_choices(model), self._provider)
        return self._graph


class MirroredReplayer:
    """Replays the candidate's choices in the reference, where only the reference is a graph that can replay.

    Args:
        replayer: Runs the reference graph, with the candidate as its own `reference`.
    """

    def __init__(self, replayer: GraphReplayer) -> None:
        self._replayer = replayer

    def replay(self, inputs: Mapping[str, Array]) -> Replay | None:
        """Run one case again; None if the candidate chooses nothing."""
        replay = self._replayer.replay(inputs)
        if replay is None or replay.got is None:
            return replay
        return Replay(replay.got, replay.expected, replay.choices, replay.own)  # scores are of the reference


def _shaped(forced: Mapping[str, Array], graph: OnnxRuntimeRunner | OpenVinoRunner) -> dict[str, Array]:
    """The choices as int64, flattened from (batch, sequence, k) to (tokens, k) where the graph's input has rank 2."""
    ranks = {spec.name: len(spec.shape) for spec in graph.inputs}
    return {
        name: np.asarray(ids.reshape(-1, ids.shape[-1]) if ranks[name] == 2 else ids, np.int64)
        for name, ids in forced.items()
    }


def watchable(artifact: Artifact, runner: Runner, recorder: Recorder | None) -> Runner:
    """The runner itself; a `WatchedGraph` instead where runs are recorded and onnxruntime runs the graph.

    A golden file then stores the choices, too.
    """
    if recorder is None or artifact.kind != "graph" or not (artifact.backend or "").startswith("onnxruntime"):
        return runner
    return WatchedGraph(artifact.path, artifact.provider)
