"""`Report`: the findings of a comparison as text, in colour, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Final, Literal, TypedDict, cast

from moe_export.verify.reports.findings import UNFINISHED, CaseResult, Findings, Row, Verdict
from moe_export.verify.reports.table import plain, rich_report

SCHEMA: Final = "moe-export/verify-report/2"


class ReportDocument(TypedDict):
    """What one comparison found."""

    schema: Literal["moe-export/verify-report/2"]
    reference: str
    candidate: str
    verdict: Verdict
    exit_code: int
    shortfall: str | None
    left_out: list[str]
    claims: list[str]
    sizes_wanted: int
    flips: int
    flips_allowed: str | None
    about: dict[str, str]
    warnings: list[str]
    outputs: Annotated[list[dict[str, Any]], list[Row]]
    cases: Annotated[list[dict[str, Any]], list[CaseResult]]


@dataclass(frozen=True)
class Report(Findings):
    """The findings of `compare`; print it, or hand it to rich. Its arguments are those of `Findings`."""

    schema: Literal["moe-export/verify-report/2"] = field(default=SCHEMA, init=False)

    def to_dict(self) -> ReportDocument:
        """As plain dicts and lists that strict JSON can hold: NaN and Inf become strings.

        `reading.read_report` makes the report again.
        """
        found: ReportDocument = {
            "schema": self.schema,
            "reference": self.reference,
            "candidate": self.candidate,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "shortfall": self.shortfall,
            "left_out": list(self.left_out),
            "claims": list(self.claims),
            "sizes_wanted": self.wanted,
            "flips": self.flips,
            "flips_allowed": None if self.budget is None else str(self.budget),
            "about": dict(self.about),
            "warnings": list(self.warnings),
            "outputs": [asdict(row) for row in self.rows],
            "cases": [asdict(case) | {"sizes": dict(case.sizes)} for case in self.cases],
        }
        return cast(ReportDocument, finite(found))

    def to_json(self) -> str:
        """`to_dict` as indented JSON, with a `schema` that names its version."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def __str__(self) -> str:
        return plain(self)

    def __rich__(self) -> Any:
        return rich_report(self)


def worst_code(reports: Iterable[Report]) -> int:
    """The exit code of several comparisons: one that differs weighs more than one that is unfinished."""
    codes = {report.exit_code for report in reports}
    return max(codes - {UNFINISHED}, default=0) or (UNFINISHED if UNFINISHED in codes else 0)


def finite(value: Any) -> Any:
    """Plain data that strict JSON can hold: NaN and Inf as strings, at whatever depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
