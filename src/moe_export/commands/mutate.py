"""`moe-export mutate graph.onnx --against model.py`: mutation tests: would `verify` notice a fault in this graph?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypedDict

from moe_export.commands.console import Console
from moe_export.comparing.mutant_result import MutantResult
from moe_export.comparing.mutation_process import Request, try_apart
from moe_export.errors import UsageError
from moe_export.verify.mutants.mutant import KINDS

SCHEMA: Final = "moe-export/mutation-report/1"


class MutantEntry(TypedDict):
    """A broken graph, and whether the comparison noticed; `off` is null where that is no number."""

    kind: str
    node: str
    what: str
    outcome: str
    by: str
    off: float | None


class MutationDocument(TypedDict):
    """How many broken graphs a comparison notices: `moe-export mutate --json`."""

    schema: Literal["moe-export/mutation-report/1"]
    graph: str
    against: str
    cases: int
    caught: int
    survived: int
    equivalent: int
    below_rounding: int
    stillborn: int
    score: float | None
    mutants: list[MutantEntry]


def run_mutate(request: Request, console: Console) -> int:
    """Run the command; the exit code."""
    unknown = [kind for kind in request.kinds if kind not in KINDS]
    if unknown:
        raise UsageError(f"no kind of mutant is called '{unknown[0]}'", hint=f"the kinds: {', '.join(KINDS)}")
    with console.step(f"trying mutants of {request.graph}"):
        trial = try_apart(request)
    score = Score(trial.results, trial.cases)
    console.json(json.dumps(score.to_dict(request.graph, request.against), indent=2))
    for line in score.lines():
        console.say(line)
    return score.exit_code


@dataclass(frozen=True)
class Score:
    """How many mutants the check caught.

    Attributes:
        results: Of each mutant.
        cases: How many cases the check has.
    """

    results: tuple[MutantResult, ...]
    cases: int

    def count(self, outcome: str, kind: str | None = None) -> int:
        """How many mutants, of a kind or of all, have this outcome."""
        return sum(result.outcome == outcome and kind in (None, result.kind) for result in self.results)

    @property
    def exit_code(self) -> int:
        """1 if a mutant survived that is not equivalent."""
        return 1 if self.count("survived") else 0

    def lines(self) -> Iterator[str]:
        """For a person."""
        outcomes = ("caught", "survived", "equivalent", "below rounding")
        yield f"\n{'kind':<16} {'mutants':>8} " + " ".join(f"{name:>{len(name) + 2}}" for name in outcomes)
        for kind in (*(kind for kind in KINDS if any(result.kind == kind for result in self.results)), None):
            counts = {name: self.count(name, kind) for name in outcomes}
            cells = " ".join(f"{count:>{len(name) + 2}}" for name, count in counts.items())
            yield f"{kind or 'all':<16} {sum(counts.values()):>8} {cells}"
        counted = self.count("caught") + self.count("survived")
        yield f"\nmutation score: {self.count('caught')} of {counted} ({self.cases} cases)"
        if self.count("stillborn"):
            yield f"{self.count('stillborn')} more were no graphs that onnxruntime opens"
        for outcome in ("equivalent", "below rounding", "survived"):
            for result in self.results:
                if result.outcome == outcome:
                    off = "" if outcome == "equivalent" else f"  (off by {result.off:.1e} in float64)"
                    yield f"  {outcome.upper() if outcome == 'survived' else outcome}: {result}{off}"

    def to_dict(self, graph: str, against: str) -> MutationDocument:
        """Plain data, for JSON."""
        counted = self.count("caught") + self.count("survived")
        return {
            "schema": SCHEMA,
            "graph": graph,
            "against": against,
            "cases": self.cases,
            "caught": self.count("caught"),
            "survived": self.count("survived"),
            "equivalent": self.count("equivalent"),
            "below_rounding": self.count("below rounding"),
            "stillborn": self.count("stillborn"),
            "score": self.count("caught") / counted if counted else None,
            "mutants": [
                {
                    "kind": result.kind,
                    "node": result.node,
                    "what": result.what,
                    "outcome": result.outcome,
                    "by": result.by,
                    "off": result.off if math.isfinite(result.off) else None,
                }
                for result in self.results
            ],
        }
