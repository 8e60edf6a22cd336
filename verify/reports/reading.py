"""A report read back from JSON, and judged again at other tolerances without running anything.

The report holds all that a tolerance decides on: the front of each output's differences (see `sketch`), elements that
are wrong at every tolerance (`odd`), and the flips. At the limits of a dtype, what a float64 run excused stays
excused; in ordinary cases it does so at the tolerance that was excused, and any other is strict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from moe_export.errors import UsageError
from moe_export.verify.judging.judge import Judgement, Standing, Worst
from moe_export.verify.judging.sketch import holds, needed_rtol
from moe_export.verify.judging.tolerance import FlipBudget, Margin, Tolerance
from moe_export.verify.reports.findings import CaseResult
from moe_export.verify.reports.report import SCHEMA, Report


def read_report(text: str) -> Report:
    """The report that `Report.to_json` wrote.

    Raises:
        UsageError: It is something else, or of another version.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UsageError(f"the report is no JSON: {error}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise UsageError(
            f"the report's schema is {schema!r}, and this reads {SCHEMA!r}",
            hint="moe-export verify ... -o report.json writes one",
        )
    try:
        budget = document["flips_allowed"]
        return Report(
            document["reference"],
            document["candidate"],
            tuple(_case(found) for found in document["cases"]),
            document["sizes_wanted"],
            None if budget is None else FlipBudget.parse(budget),
            document["about"],
            tuple(document.get("left_out", ())),  # older reports of this version have none
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the report is damaged: {type(error).__name__}: {error}") from None


def _case(found: Mapping[str, Any]) -> CaseResult:
    return CaseResult(
        found["label"],
        found["seed"],
        tuple(found["sizes"].items()),
        found["outcome"],
        found["reason"],
        tuple(_judgement(entry) for entry in found["judgements"]),
        found["regime"],
    )


_LATER: Mapping[str, Any] = {"rounding": 0.0, "standing": None}
"""What older reports of this version have not."""
_FLOATS = ("max_abs", "max_rel", "reference_off", "candidate_off")


def _judgement(found: Mapping[str, Any]) -> Judgement:
    known = {field.name: found[field.name] for field in fields(Judgement) if field.name not in _LATER}
    known |= {name: found.get(name, default) for name, default in _LATER.items()}
    known |= {name: float(known[name]) for name in _FLOATS}  # NaN and Inf are strings in JSON
    if known["worst"] is not None:
        worst = known["worst"]
        known["worst"] = Worst(
            tuple(worst["index"]), _scalar(worst["candidate"]), _scalar(worst["reference"])
        )
    if known["standing"] is not None:
        standing = known["standing"]
        known["standing"] = Standing(
            float(standing["own"]), float(standing["theirs"]), float(standing["ratio"]), standing["beyond"],
            None if standing.get("another_way") is None else float(standing["another_way"]),
        )  # fmt: skip
    if known["margin"] is not None:
        known["margin"] = Margin(**known["margin"])
    known["front"] = tuple((float(size), float(difference)) for size, difference in known["front"])
    known["decades"] = tuple((int(decade), int(count)) for decade, count in known["decades"])
    return Judgement(**known)


def _scalar(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def judge_again(report: Report, tolerance: Tolerance, budget: FlipBudget | None = None) -> Report:
    """The same findings at another tolerance; `budget` replaces the report's if it is given."""
    cases = tuple(
        replace(case, judgements=tuple(_again(found, tolerance) for found in case.judgements))
        for case in report.cases
    )
    return replace(report, cases=cases, budget=report.budget if budget is None else budget)


def _again(found: Judgement, tolerance: Tolerance) -> Judgement:
    if found.margin is None or found.undecided:
        return found
    margin = _margin(found, tolerance)
    if found.standing is not None and margin == found.margin:
        return found
    fits = holds(found.front, margin)
    if found.odd or (fits and found.ok):
        return replace(found, margin=margin)
    if fits:
        return replace(found, margin=margin, reason=None, bad=0)
    needed = needed_rtol(found.front, margin.atol)
    reason = f"beyond {margin}; rtol {needed:.2e} would do" if needed < float("inf") else f"beyond {margin}"
    return replace(found, margin=margin, reason=reason, bad=max(found.bad, 1))


def _margin(found: Judgement, tolerance: Tolerance) -> Margin:
    """The new margin; a part that is not asked for stays as it was."""
    assert found.margin is not None
    if found.output in tolerance.outputs:
        return tolerance.outputs[found.output]
    return Margin(
        found.margin.rtol if tolerance.rtol is None else tolerance.rtol,
        found.margin.atol if tolerance.atol is None else tolerance.atol,
    )
