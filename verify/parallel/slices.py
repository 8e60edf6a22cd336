"""How a case is split where every rank has tokens of its own: rows of the batch, in order.

The first axis of the first input is the batch, if it is a dimension with a name; whatever else has it as its first
axis is split with it. A batch that R does not divide is split unevenly. A rank without rows computes the
last one again and its result is dropped, because engines may not support empty inputs. Where there is no batch,
every rank has the whole case.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_export.verify.runner import Runner
from moe_export.verify.specs import Array, TensorSpec


@dataclass(frozen=True)
class Slices:
    """How inputs are split over ranks, and outputs joined.

    Attributes:
        ranks: How many.
        inputs, outputs: Of the model.
        batch: The dimension; None where there is none.
    """

    ranks: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batch(self) -> str | None:
        """The dimension that is split."""
        first = self.inputs[0].shape[:1] if self.inputs else ()
        return first[0] if first and isinstance(first[0], str) and first[0].isidentifier() else None

    def split(self, inputs: Mapping[str, Array]) -> list[tuple[dict[str, Array], bool]]:
        """For each rank its inputs, and whether its outputs are used."""
        if self.batch is None:
            return [(dict(inputs), True)] * self.ranks
        size = len(inputs[self.inputs[0].name])
        bounds = [size * rank // self.ranks for rank in range(self.ranks + 1)]
        found = []
        for begin, end in itertools.pairwise(bounds):
            wanted = end > begin or not size
            rows = slice(begin, end) if wanted else slice(size - 1, size)
            mine = {
                spec.name: np.ascontiguousarray(inputs[spec.name][rows])
                if spec.shape[:1] == (self.batch,)
                else inputs[spec.name]
                for spec in self.inputs
            }
            found.append((mine, wanted))
        return found

    def join(self, found: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """The outputs of several ranks as one: along the axis that the batch is in, else stacked."""
        joined = {}
        for spec in self.outputs:
            arrays = [outputs[spec.name] for outputs in found]
            axis = next((place for place, size in enumerate(spec.shape) if self._is_batch(size)), None)
            joined[spec.name] = np.stack(arrays) if axis is None else np.concatenate(arrays, axis)
        return joined

    def _is_batch(self, size: int | str) -> bool:
        return self.batch is not None and re.search(rf"\b{self.batch}\b", str(size)) is not None


@dataclass(frozen=True, eq=False)
class Sliced:
    """An engine that is run on each rank's part by itself: what every rank must give.

    Attributes:
        runner: The whole model.
        slices: How it is split.
    """

    runner: Runner
    slices: Slices

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.runner.name}, rank by rank"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run on each part; outputs of unused parts are left out."""
        parts = [mine for mine, wanted in self.slices.split(inputs) if wanted]
        return self.slices.join([self.runner.run(mine) for mine in parts])


@dataclass(frozen=True, eq=False)
class Joined:
    """Ranks with tokens of their own as one engine.

    Attributes:
        name: What reports call it.
        run_each: Runs each rank on its inputs.
        slices: How they are split.
    """

    name: str
    run_each: Callable[[Sequence[Mapping[str, Array]]], Sequence[Mapping[str, Array]]]
    slices: Slices

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Split, run, join."""
        parts = self.slices.split(inputs)
        found = self.run_each([mine for mine, _ in parts])
        return self.slices.join([one for one, (_, wanted) in zip(found, parts, strict=True) if wanted])
