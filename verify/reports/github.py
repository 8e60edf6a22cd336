"""A report for GitHub: an annotation on the model's line, and a table in the step's summary."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from moe_export.verify.reports.report import Report
from moe_export.verify.reports.table import figure

_MARKS = {"equal": "✅", "not equal": "❌", "not proven": "⚠️", "unfinished": "⏳"}


def workflow_commands(report: Report) -> Iterator[str]:
    """Workflow commands, a line each: an error for what differs, a warning for what weakens the verdict."""
    place = _place(report)
    for row in report.rows:
        if not row.equal:
            yield _command("error", place, f"{row.output} differs", f"{row.at}: {row.reason}")
    for case in report.cases:
        if case.outcome == "failed":
            yield _command("error", place, f"{report.candidate} fails", f"{case.label}: {case.reason}")
    if report.verdict in {"not proven", "unfinished"}:
        yield _command("error", place, report.verdict, report.shortfall or "")
    for warning in report.warnings:
        yield _command("warning", place, "verification", warning)


def _place(report: Report) -> str:
    """`file=models/moe.py,line=12,` where the model's line is known; paths are the repository's."""
    file, _, line = report.about.get("line", "").rpartition(":")
    if not file or not line.isdigit():
        return ""
    root = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd())
    try:
        shown = Path(file).resolve().relative_to(root.resolve())
    except ValueError:
        shown = Path(file)
    return f"file={_escaped(str(shown), property=True)},line={line},"


def _command(level: str, place: str, title: str, text: str) -> str:
    return f"::{level} {place}title={_escaped(title, property=True)}::{_escaped(text)}"


def _escaped(text: str, *, property: bool = False) -> str:
    for old, new in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        text = text.replace(old, new)
    return text.replace(":", "%3A").replace(",", "%2C") if property else text


def summary(report: Report) -> str:
    """Markdown: the verdict, a row an output, and what was compared."""
    about = report.about
    compared = (
        f"{about.get('candidate', report.candidate)} against {about.get('reference', report.reference)}"
    )
    lines = [
        f"### {_MARKS[report.verdict]} {_cell(compared)}: {report.verdict}",
        "",
        "| output | dtype | max abs | max rel | at | verdict |",
        "|---|---|--:|--:|---|---|",
    ]
    for row in report.rows:
        cells = (row.output, row.dtype, figure(row.max_abs), figure(row.max_rel), row.at)
        verdict = "equal" if row.equal else f"**differs**: {row.reason}"
        lines.append("| " + " | ".join(map(_cell, (*cells, verdict))) + " |")
    sizes = len({case.sizes for case in report.compared})
    ranges = f" ({', '.join(map(_cell, report.claims))})" if report.claims else ""
    lines += [
        "",
        f"{len(report.compared)} cases at {sizes} size combinations{ranges}, "
        f"{report.candidate} and {report.reference}.",
    ]
    if report.shortfall:
        lines.append(f"{report.verdict.capitalize()}: {_cell(report.shortfall)}.")
    lines += [f"- {_cell(warning)}" for warning in report.warnings]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    for old, new in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", " ")):
        text = text.replace(old, new)
    return text
