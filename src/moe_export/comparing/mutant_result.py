"""`MutantResult`: the result of one mutant, as plain data that can be sent between processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_export.verify.mutants.mutant import Mutant


@dataclass(frozen=True)
class MutantResult:
    """The result of one mutant.

    Attributes:
        kind: The kind of mutant.
        node: The node that was changed, or that reads the constant that was.
        what: The change, in words.
        outcome: `caught`; `survived`; `equivalent` (the same in float64 in every case); `below rounding` (in float64 it
            moves no output by as much as one rounding of the graph's type, so no output can show it); or `stillborn`
            (onnxruntime does not open the graph).
        by: The label of the case that caught it, or why it was stillborn.
        off: For a mutant that was not caught, the largest error of its outputs in float64, relative to the largest
            value; NaN if no case runs in float64.
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
    """The result of a mutant, from the mutant and its outcome."""
    return MutantResult(mutant.kind, mutant.node, mutant.what, outcome, by, off)
