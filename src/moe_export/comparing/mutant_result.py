"""`MutantResult`: the result of one mutant, as data that goes from process to process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_export.verify.mutants.mutant import Mutant


@dataclass(frozen=True)
class MutantResult:
    """The result of one mutant.

    Attributes:
        kind: What kind it was.
        node: The node that was changed, or that reads the constant that was.
        what: What was wrong.
        outcome: `caught`; `survived`; `equivalent` (the same in float64 in every case); `below rounding` (in float64 it
            moves no output by as much as one rounding of the graph's type, so no output can show it); or `stillborn`
            (no graph that onnxruntime opens).
        by: The case that caught it, or why it was stillborn.
        off: How far the outputs of one that was not caught are off in float64, relative to the largest value.
    """

    kind: str
    node: str
    what: str
    outcome: str
    by: str = ""
    off: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}: {self.node}: {self.what}"


def result_of(mutant: Mutant, outcome: str, by: str = "", off: float = 0.0) -> MutantResult:
    """The result of a mutant."""
    return MutantResult(mutant.kind, mutant.node, mutant.what, outcome, by, off)
