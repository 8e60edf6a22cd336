"""One artifact under the names of the other: by name where they agree, else by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_export.verify import Array, Runner


@dataclass(frozen=True, eq=False)
class Renamed:
    """An engine under the names of the other artifact.

    Attributes:
        runner: The engine.
        inputs: Input names of the other artifact → the engine's; inputs that are missing here are dropped.
        outputs: The engine's output names → those of the other artifact.
    """

    runner: Runner
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.runner.name

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        found = self.runner.run({own: inputs[name] for name, own in self.inputs.items()})
        return {self.outputs.get(name, name): array for name, array in found.items()}


def by_position(own: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """Own names → wanted names: by position if there are as many and the sets differ, else unchanged."""
    if len(own) != len(wanted) or set(own) == set(wanted):
        return {name: name for name in own}
    return dict(zip(own, wanted, strict=True))
