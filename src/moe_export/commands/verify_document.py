"""What `moe-export verify --json` prints, as types."""

from __future__ import annotations

from typing import Literal, TypedDict

from moe_export.comparing.explaining import Why
from moe_export.verify.reports.report import ReportDocument


class NotRun(TypedDict):
    """A backend that could not run the graph, and why."""

    candidate: str
    reason: str


class _Several(TypedDict):
    schema: Literal["moe-export/verify-reports/1"]
    reports: list[ReportDocument]


class SeveralDocument(_Several, total=False):
    """What several comparisons found: `moe-export verify --json` with more than one `--against` or backend."""

    not_run: list[NotRun]


class VerifyDocument(ReportDocument, total=False):
    """What one comparison found, and the first faulty node: `moe-export verify --json`, `-o FILE.json`."""

    why: Why
