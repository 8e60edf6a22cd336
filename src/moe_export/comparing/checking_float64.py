"""A model in float64: it shows which of two results that differ is the inaccurate one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_export.export.frontend.subject import Subject
from moe_export.float64 import double_module
from moe_export.verify import Array, Choice, TorchRunner
from moe_export.verify.specs import is_float


class Float64Runner:
    """A model in float64; its weights are copied at the first run.

    Args:
        subject: The model.
        outputs: Names for its outputs, in order.
        rounded: Whether float outputs are rounded to the model's own types, so that they compare like any others.
    """

    name = "torch-float64"

    def __init__(self, subject: Subject, outputs: Sequence[str], *, rounded: bool = False) -> None:
        self._subject, self._outputs, self._rounded = subject, outputs, rounded
        self._runner: TorchRunner | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; float inputs are cast to float64."""
        return self._narrowed(inputs, self._wide().run(inputs))

    def run_watched(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[Choice, ...]]:
        """Run once; return the outputs and the choices that the model made, whose scores stay float64."""
        found, choices = self._wide().run_watched(inputs)
        return self._narrowed(inputs, found), choices

    def run_under(
        self,
        inputs: Mapping[str, Array],
        choices: Sequence[Choice],
        rounded: tuple[int, float] | None = None,
    ) -> dict[str, Array] | None:
        """Run once as another program might (see `TorchRunner`); None if the model chooses something else."""
        found = self._wide().run_under(inputs, choices, rounded)
        return None if found is None else self._narrowed(inputs, found)

    def scores_under(
        self, inputs: Mapping[str, Array], choices: Sequence[Choice]
    ) -> tuple[Array, ...] | None:
        """The scores of each choice, float64 (see `TorchRunner`)."""
        return self._wide().scores_under(inputs, choices)

    def _wide(self) -> TorchRunner:
        if self._runner is None:
            wide = self._subject.of(double_module(self._subject.module))
            self._runner = TorchRunner(wide.call_named, self._outputs, self.name, "float64")
        return self._runner

    def _narrowed(self, inputs: Mapping[str, Array], found: dict[str, Array]) -> dict[str, Array]:
        if not self._rounded:
            return found
        own = TorchRunner(self._subject.call_named, self._outputs).run(inputs)
        return {
            name: array.astype(own[name].dtype) if is_float(array.dtype) else array
            for name, array in found.items()
        }
