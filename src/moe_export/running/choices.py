"""Runners that compare a low-precision graph with its float32 form, both taking the same experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from moe_export.backends import OPENVINO
from moe_export.export.onnx.float32_kernels import with_float32_kernels
from moe_export.export.onnx.serialize import write_model
from moe_export.export.precision.choices import (
    Choices,
    find_choices,
    with_choices_out,
    with_forced_choices,
)
from moe_export.verify import Array, OnnxRuntimeRunner
from moe_export.verify.runners.openvino_runner import OpenVinoRunner


@dataclass(frozen=True)
class ReplayingRunner:
    """The float32 graph, replaying the choices of the low-precision graph.

    Attributes:
        wide: The float32 graph, with choices as inputs.
        chooser: The low-precision graph, with its choices as outputs.
        choices: The names of these inputs and outputs.
    """

    wide: OnnxRuntimeRunner
    chooser: OnnxRuntimeRunner
    choices: Choices

    @property
    def name(self) -> str:
        """What reports call it."""
        return "the float32 graph with the same experts"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the chooser, then the float32 graph with its choices."""
        made = self.chooser.run(inputs)
        forced = {
            name: made[choice] for name, choice in zip(self.choices.forced, self.choices.made, strict=True)
        }
        return self.wide.run({**inputs, **forced})

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """For each choice, the output with the chosen experts and the output with the scores it was made by."""
        return tuple(zip(self.choices.made, self.choices.scores, strict=True))


def replaying_and_chooser(
    wide: ir.Model, narrow: ir.Model, provider: str
) -> tuple[ReplayingRunner, OnnxRuntimeRunner, OnnxRuntimeRunner] | None:
    """The two graphs to compare, and the unchanged float32 graph.

    Args:
        wide: The graph in float32.
        narrow: The same graph in low precision.
        provider: Where onnxruntime runs, `cpu` or `cuda`.

    Returns:
        The float32 graph with replay, the low-precision graph and the unchanged float32 graph; None if the graph
        chooses nothing, or the two do not have as many choices.
    """
    count = len(find_choices(narrow))
    if not count or count != len(find_choices(wide)):
        return None
    chooser = _runner(with_choices_out(narrow), provider)
    forced = _runner(with_forced_choices(wide), provider)
    return ReplayingRunner(forced, chooser, Choices(count)), chooser, _runner(wide, provider)


def runner_of(path: Path, provider: str, dtype: str = "float32", *, exact: bool = True) -> OnnxRuntimeRunner:
    """Onnxruntime on a file; on the CPU each operator of a half-precision graph runs in float32, and is rounded."""
    if provider != "cpu" or dtype == "float32":
        return OnnxRuntimeRunner(path, provider, exact=exact)
    return _runner(ir.load(path), provider, f", rounding to {dtype}")


def runner_of_model(model: ir.Model, provider: str) -> OnnxRuntimeRunner | OpenVinoRunner:
    """Onnxruntime on a graph in memory, like `runner_of` on a file; or OpenVINO, if that is the provider."""
    if provider != OPENVINO:
        return _runner(model, provider)
    with TemporaryDirectory(prefix="moe-export-") as folder:
        file = Path(folder, "model.onnx")
        write_model(model, file)
        return OpenVinoRunner(file)


def _runner(model: ir.Model, provider: str, also: str = "") -> OnnxRuntimeRunner:
    if provider == "cpu":
        model = with_float32_kernels(model)
    with TemporaryDirectory(prefix="moe-export-") as folder:
        file = Path(folder, "model.onnx")
        write_model(model, file)
        runner = OnnxRuntimeRunner(file, provider)
    runner.name += also
    return runner
