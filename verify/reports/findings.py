"""What a comparison found, as data: every case, a row an output, a verdict, an exit code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from moe_export.verify.inputs.cases import Case
from moe_export.verify.inputs.regimes import NORMAL, STRESS, TIES
from moe_export.verify.judging.judge import Judgement, Worst
from moe_export.verify.judging.replay import is_choice
from moe_export.verify.judging.tolerance import FlipBudget

LEFT_TO_CPU = "left to the CPU"
"""The fact, in `Report.about`, of nodes that did not run where the rest did."""
PART = "compared with"
"""The fact of what was compared, where it is not the whole model."""
PRECISION = "precision"
"""The fact of a graph that computes in half precision, and is not judged by what that loses."""

Outcome = Literal["compared", "refused", "no memory", "failed"]
Verdict = Literal["equal", "not equal", "not proven", "unfinished"]
UNFINISHED = 5
"""The exit code of a comparison that a time limit cut off."""


@dataclass(frozen=True)
class CaseResult:
    """The result of one case.

    Args:
        label: The case's label; with `seed` it reproduces the inputs.
        seed: The seed given to `cases`.
        sizes: Its dynamic sizes, as (name, size) pairs.
        outcome: "compared" (both ran), "refused" (the reference raised), "no memory" (the candidate ran out of it,
            which says nothing about what it computes) or "failed" (only the candidate did).
        reason: What was raised, in one line.
        judgements: One an output, if both ran.
        regime: The kind of values (see `regimes`).
    """

    label: str
    seed: int
    sizes: Annotated[tuple[tuple[str, int], ...], dict[str, int]]
    outcome: Outcome
    reason: str | None = None
    judgements: tuple[Judgement, ...] = ()
    regime: str = NORMAL

    @classmethod
    def of(
        cls, case: Case, outcome: Outcome, reason: str | None, judgements: tuple[Judgement, ...] = ()
    ) -> CaseResult:
        """The result of `case`, without its arrays."""
        return cls(case.label, case.seed, tuple(case.sizes.items()), outcome, reason, judgements, case.regime)


@dataclass(frozen=True)
class Row:
    """One output over all compared cases; `at` is the label of the case with the worst element."""

    output: str
    kind: str
    dtype: str
    equal: bool
    max_abs: float
    max_rel: float
    at: str
    bad: int
    total: int
    flips: int
    reason: str | None
    worst: Worst | None


@dataclass(frozen=True)
class Findings:
    """The results of all cases, and what follows from them.

    Args:
        reference: Name of the engine that is right by definition.
        candidate: Name of the engine in question.
        cases: The result of every case, in order.
        wanted: How many different sizes, the example's included, the verdict "equal" takes; where fewer were
            on offer, all of them.
        budget: How many tokens may go to another expert in a tie; None for any number. Cases whose values are
            made to tie do not count.
        about: Where the two artifacts come from: `reference`, `candidate` (files), `line` (of the model,
            `model.py:12`), and what else a reader may want.
        left_out: Labels of the cases that a time limit cut off.
    """

    reference: str
    candidate: str
    cases: tuple[CaseResult, ...]
    wanted: int = 4
    budget: FlipBudget | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Whether the candidate is equal; where nothing differs, whether all was compared, and enough."""
        failed = any(case.outcome == "failed" for case in self.cases)
        if failed or any(not row.equal for row in self.rows):
            return "not equal"
        if self.left_out:
            return "unfinished"
        return "not proven" if self.shortfall else "equal"

    @property
    def exit_code(self) -> int:
        """0 if equal, 5 if unfinished, else 1."""
        return {"equal": 0, "unfinished": UNFINISHED}.get(self.verdict, 1)

    @property
    def shortfall(self) -> str | None:
        """Why agreement would not prove equality; None if it would."""
        if self.left_out:
            planned = len(self.cases) + len(self.left_out)
            cut = "; ".join(self.left_out)
            return f"{len(self.cases)} of {planned} cases compared, not compared: {cut}"
        greedy = [case.label for case in self.cases if case.outcome == "no memory"]
        if greedy:
            return f"{self.candidate} ran out of memory where {self.reference} did not: {'; '.join(greedy)}"
        offered, compared = ({c.sizes for c in cases} for cases in (self.cases, self.compared))
        needed = max(1, min(self.wanted, len(offered)))
        if len(compared) < needed:
            return f"{len(compared)} of {needed} sizes could be compared"
        if not any(case.judgements for case in self.compared):
            return "there are no outputs to compare"
        blind = [name for name, all_nan in self._blind().items() if all_nan]
        if blind:
            return f"{', '.join(blind)}: NaN throughout in every case"
        silent = [
            row.output
            for row in self.rows
            if not is_choice(row.output) and (not row.total or self._always_undecided(row.output))
        ]
        return f"{', '.join(silent)}: empty or undecided in every case" if silent else None

    def _always_undecided(self, output: str) -> bool:
        found = [j.undecided for case in self.compared for j in case.judgements if j.output == output]
        return all(found)

    @property
    def compared(self) -> tuple[CaseResult, ...]:
        """The cases that both engines ran."""
        return tuple(case for case in self.cases if case.outcome == "compared")

    @property
    def claims(self) -> tuple[str, ...]:
        """The sizes of each dimension that were compared: `sequence 1..4096`."""
        sizes: dict[str, set[int]] = {}
        for case in self.compared:
            for name, size in case.sizes:
                sizes.setdefault(name, set()).add(size)
        return tuple(
            f"{name} {min(found)}..{max(found)}" if len(found) > 1 else f"{name} {min(found)} only"
            for name, found in sizes.items()
        )

    @property
    def flips(self) -> int:
        """Tokens that went to another expert in a tie, over all cases."""
        return sum(judgement.flips for case in self.cases for judgement in case.judgements)

    @property
    def rows(self) -> tuple[Row, ...]:
        """One an output, in the reference's order."""
        by_output: dict[str, list[tuple[str, Judgement]]] = {}
        for case in self.cases:
            for judgement in case.judgements:
                by_output.setdefault(judgement.output, []).append((case.label, judgement))
        rows = (_row(found) for found in by_output.values())
        return tuple(self._within_budget(row) for row in rows)

    def _within_budget(self, row: Row) -> Row:
        """The row, not equal if more of its tokens were flipped than may be."""
        if self.budget is None or not row.equal or row.kind != "routing":
            return row
        found = [
            j
            for case in self.compared
            if case.regime not in TIES
            for j in case.judgements
            if j.output == row.output
        ]
        flips, tokens = sum(j.flips for j in found), sum(j.tokens for j in found)
        if flips <= self.budget.allowed(tokens):
            return row
        reason = f"{flips} of {tokens} tokens went to another expert in a tie, more than {self.budget}"
        return replace(row, equal=False, reason=reason)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reservations about the verdict: outputs that some case could not check; nodes that ran on another device."""
        left = self.about.get(LEFT_TO_CPU)
        found = [f"{self.candidate} left {left} to the CPU"] if left else []
        if PRECISION in self.about and self.exit_code:
            found.append(self.about[PRECISION])
        for name in self._blind():
            labels = [
                c.label for c in self.compared if any(j.output == name and _all_nan(j) for j in c.judgements)
            ]
            found.append(f"output '{name}' of {self.reference} is NaN throughout at {_listed(labels)}")
        return (*found, *self._undecided(), *self._imprecise(), *self._rounded())

    def _undecided(self) -> Iterator[str]:
        """Outputs that some case could not decide, by reason."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for case in self.compared:
            for judgement in case.judgements:
                if judgement.undecided:
                    reasons.setdefault((judgement.output, judgement.undecided), []).append(case.label)
        for (name, reason), labels in reasons.items():
            yield f"output '{name}' is undecided at {_listed(labels)}: {reason}"

    def _imprecise(self) -> Iterator[str]:
        """Outputs where the float64 run shows that the reference is no nearer to the truth than the candidate."""
        for row in self.rows:
            for case in self.compared:
                for j in case.judgements:
                    if j.output == row.output and not j.ok and j.reference_off >= j.candidate_off:
                        yield (
                            f"output '{j.output}' at {case.label}: {self.reference} itself is {j.reference_off:.1e} "
                            f"from a float64 run, {self.candidate} {j.candidate_off:.1e}"
                        )
                        break

    def _rounded(self) -> Iterator[str]:
        """Outputs whose margin has room for the rounding of weights."""
        for row in self.rows:
            found = [
                (j.rounding, j.margin, case.label)
                for case in self.compared
                for j in case.judgements
                if j.output == row.output and j.rounding and j.margin is not None
            ]
            if found:
                moved, margin, label = max(found, key=lambda each: each[0])
                yield (
                    f"output '{row.output}' is judged by {margin} at {label}: rounding the weights alone moves it by "
                    f"up to {moved:.1e}"
                )

    @property
    def by_float64(self) -> tuple[tuple[str, Judgement], ...]:
        """Outputs that are beyond their tolerance, each with the label and the judgement of the case that is worst."""
        worst: dict[str, tuple[str, Judgement]] = {}
        for case in self.compared:
            for j in case.judgements:
                if j.standing is None:
                    continue
                _, known = worst.get(j.output, ("", None))
                if known is None or known.standing is None or _badness(j) > _badness(known):
                    worst[j.output] = case.label, j
        return tuple(worst.values())

    def _blind(self) -> dict[str, bool]:
        """Outputs that are NaN throughout in some case → whether in all."""
        nan_in: dict[str, list[bool]] = {}
        for case in self.compared:
            if case.regime in STRESS:
                continue  # NaN is what such values are for
            for judgement in case.judgements:
                nan_in.setdefault(judgement.output, []).append(_all_nan(judgement))
        return {name: all(found) for name, found in nan_in.items() if any(found)}


def _row(found: list[tuple[str, Judgement]]) -> Row:
    label, worst = max(found, key=lambda item: (not item[1].ok, _rank(item[1].max_abs)))
    judgements = [judgement for _, judgement in found]
    return Row(
        output=worst.output,
        kind=worst.kind,
        dtype=worst.dtype,
        equal=worst.ok,
        max_abs=_most(judgements, lambda j: j.max_abs),
        max_rel=_most(judgements, lambda j: j.max_rel),
        at=label,
        bad=sum(judgement.bad for judgement in judgements),
        total=sum(judgement.total for judgement in judgements),
        flips=sum(judgement.flips for judgement in judgements),
        reason=worst.reason,
        worst=worst.worst,
    )


def _badness(judgement: Judgement) -> tuple[bool, float]:
    """Sort key: what is not excused first, then the ratio to the reference's error."""
    return not judgement.ok, judgement.standing.ratio if judgement.standing else 0.0


def _most(judgements: list[Judgement], figure: Callable[[Judgement], float]) -> float:
    """The largest figure that could be measured; NaN if none could."""
    return max((figure(j) for j in judgements if not math.isnan(figure(j))), default=float("nan"))


def _rank(figure: float) -> float:
    return -1.0 if math.isnan(figure) else figure


def _all_nan(judgement: Judgement) -> bool:
    return judgement.total > 0 and judgement.nans == judgement.total


def _listed(labels: list[str], limit: int = 3) -> str:
    more = f" and {len(labels) - limit} more" if len(labels) > limit else ""
    return "; ".join(labels[:limit]) + more
