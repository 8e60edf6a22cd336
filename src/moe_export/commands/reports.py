"""Reports for other programs: JSON, JUnit XML, an HTML page, GitHub's annotations and step summary."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.commands.console import Console
from moe_export.errors import UsageError
from moe_export.own_files import put_text, require_free

if TYPE_CHECKING:
    from moe_export.verify import Report


@dataclass(frozen=True)
class Wanted:
    """Which reports to write, besides the text.

    Attributes:
        files: JSON, JUnit XML or a page each, by its ending.
        github: Annotations on stdout, and the step summary.
        force: Overwrite inputs, and files that are not ours.
    """

    files: tuple[Path, ...] = ()
    github: bool = False
    force: bool = False

    def require_free(self, inputs: Sequence[Path]) -> None:
        """Refuse to overwrite what is not ours, before anything is run.

        Raises:
            UsageError: A file is in the way.
        """
        for file in self.files:
            require_free(file, ENDINGS[file.suffix], inputs=inputs, force=self.force)


ENDINGS = {".json": "report", "": "report", ".xml": "text", ".html": "text"}
"""What a report is, by its file's ending; `/dev/stderr` has none."""


def take_wanted(options: dict[str, Any]) -> Wanted:
    """Take these options out of a command's.

    Raises:
        UsageError: The ending of a file says nothing.
    """
    github, files = options.pop("github"), tuple(map(Path, options.pop("output")))
    for file in files:
        if file.suffix not in ENDINGS:
            raise UsageError(f"a report is a .json, .xml or .html file, not {file}")
    return Wanted(files=files, force=options.pop("force"), github=_on_github(github))


def take_wanted_of_export(options: dict[str, Any]) -> Wanted:
    """Likewise of an export's, which writes a report as JSON anyway.

    Raises:
        UsageError: The ending of a file says nothing.
    """
    files = tuple(map(Path, options.pop("reports")))
    for file in files:
        if file.suffix not in (".xml", ".html"):
            raise UsageError(
                f"--report writes a .xml or .html file, not {file}",
                hint="MODEL.report.json is written anyway",
            )
    return Wanted(files=files, force=options["force"], github=_on_github(options.pop("github")))


def _on_github(asked: bool | None) -> bool:
    return bool(os.environ.get("GITHUB_ACTIONS")) if asked is None else asked


def write_reports(
    reports: Sequence[Report], wanted: Wanted, console: Console, inputs: Sequence[Path]
) -> None:
    """Write what is wanted.

    Args:
        reports: What was found.
        wanted: Which files.
        console: Whether stdout is one JSON document.
        inputs: What the command read: it is not overwritten.

    Raises:
        UsageError: A file cannot be written, or must not be overwritten.
    """
    from moe_export.verify.reports.github import summary, workflow_commands
    from moe_export.verify.reports.junit import junit
    from moe_export.verify.reports.page import page

    for file in wanted.files:
        if ENDINGS[file.suffix] == "report" and len(reports) > 1:
            raise UsageError(f"{file} takes one comparison", hint="one command for each --against")
        make = {".xml": junit, ".html": page}.get(file.suffix, _one)
        put_text(file, make(reports), inputs=inputs, force=wanted.force)
    if not wanted.github:
        return
    if not console.as_json:  # stdout is one JSON document then; GitHub reads commands from it line by line
        for report in reports:
            for line in workflow_commands(report):
                print(line, flush=True)
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if target:
        with Path(target).open("a", encoding="utf-8") as step_summary:
            step_summary.writelines(f"{summary(report)}\n" for report in reports)


def _one(reports: Sequence[Report]) -> str:
    return reports[0].to_json()
