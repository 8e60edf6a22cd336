"""One part of a graph in onnxruntime; its weights are loaded at the first run and freed with the runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from moe_export.export.onnx.float32_kernels import with_float32_kernels
from moe_export.export.precision.choices import Choices, find_choices, with_forced_choices
from moe_export.export.weights.recipe import Recipe
from moe_export.large.layerwise_graph import CutGraph, Part
from moe_export.verify import Array, Choice, OnnxRuntimeRunner

_NO_INPUTS = (ir.DataType.INT4, ir.DataType.UINT4)
"""Types that ONNX Runtime takes from no array."""


class PartRunner:
    """Runs a part of a graph. Its weights are inputs of the session, so that onnxruntime neither copies nor folds them.

    Args:
        graph: The graph.
        part: The part of it.
    """

    def __init__(self, graph: CutGraph, part: Part) -> None:
        self._graph, self._part = graph, part
        self._runner: OnnxRuntimeRunner | None = None
        self._choices = Choices(0)
        self._weights: dict[str, Array] = {}

    def run(
        self, values: Mapping[str, Array], chose: Sequence[Choice]
    ) -> tuple[dict[str, Array], tuple[Choice, ...]]:
        """Run once.

        Args:
            values: Values by name, among them the part's inputs.
            chose: The choices to replay; ignored if the part does not make as many.

        Returns:
            The part's outputs by name; and the choices that it would have made itself, with its scores, for those that
            it replayed.

        Raises:
            MoeExportError: onnxruntime cannot open or run the part.
        """
        if self._runner is None:
            self._open(values, len(chose))
        assert self._runner is not None
        ranks = {spec.name: len(spec.shape) for spec in self._runner.inputs}
        feeds = {name: values[name] for name in self._part.takes if name in ranks} | self._weights
        for name, choice in zip(self._choices.forced, chose, strict=False):
            ids = choice.ids.reshape(-1, choice.ids.shape[-1]) if ranks[name] == 2 else choice.ids
            feeds[name] = np.asarray(ids, np.int64)
        found = self._runner.run(feeds)
        own = tuple(
            Choice(found[made].reshape(forced.ids.shape), found[scores].reshape(forced.scores.shape))
            for made, scores, forced in zip(self._choices.made, self._choices.scores, chose, strict=False)
        )
        return {name: found[name] for name in self._part.gives}, own

    def _open(self, values: Mapping[str, Array], choices: int) -> None:
        proto = onnx.shape_inference.infer_shapes(self._graph.model_of(self._part, values))
        model = ir.from_proto(proto)
        if choices and len(find_choices(model)) == choices:
            self._choices = Choices(choices)
            model = with_forced_choices(model)
        weights = self._graph.weights_of(self._part)
        _put_inside(model, {name: recipe for name, recipe in weights.items() if recipe.dtype in _NO_INPUTS})
        content = ir.to_proto(with_float32_kernels(model)).SerializeToString()
        self._runner = OnnxRuntimeRunner(content, arena=False)
        taken = {spec.name for spec in self._runner.inputs}
        self._weights = {name: recipe.array() for name, recipe in weights.items() if name in taken}


def _put_inside(model: ir.Model, weights: Mapping[str, Recipe]) -> None:
    """Make weights of inputs."""
    for value in list(model.graph.inputs):
        recipe = weights.get(str(value.name))
        if recipe is not None:
            model.graph.inputs.remove(value)
            value.const_value = ir.Tensor(recipe.array(), dtype=recipe.dtype, name=value.name)
            model.graph.register_initializer(value)
