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
        json: A file for the report as JSON.
        junit: A file for JUnit XML.
        html: A file for the page.
        github: Annotations on stdout, and the step summary.
        force: Overwrite inputs, and files that are not ours.
    """

    json: str | None = None
    junit: str | None = None
    html: str | None = None
    github: bool = False
    force: bool = False

    def require_free(self, inputs: Sequence[Path]) -> None:
        """Refuse to overwrite what is not ours, before anything is run.

        Raises:
            UsageError: A file is in the way.
        """
        for file, kind in ((self.json, "report"), (self.junit, "text"), (self.html, "text")):
            if file:
                require_free(Path(file), kind, inputs=inputs, force=self.force)


def take_wanted(options: dict[str, Any]) -> Wanted:
    """Take these options out of a command's."""
    github = options.pop("github")
    return Wanted(
        json=options.pop("report"),
        junit=options.pop("junit"),
        html=options.pop("html"),
        force=options.pop("force"),
        github=bool(os.environ.get("GITHUB_ACTIONS")) if github is None else github,
    )


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

    if wanted.json:
        if len(reports) > 1:
            raise UsageError("--report takes one comparison", hint="one command for each --against")
        put_text(Path(wanted.json), reports[0].to_json(), inputs=inputs, force=wanted.force)
    if wanted.junit:
        put_text(Path(wanted.junit), junit(reports), inputs=inputs, force=wanted.force)
    if wanted.html:
        put_text(Path(wanted.html), page(reports), inputs=inputs, force=wanted.force)
    if not wanted.github:
        return
    if not console.as_json:  # stdout is one JSON document then; GitHub reads commands from it line by line
        for report in reports:
            for line in workflow_commands(report):
                print(line, flush=True)
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if target:
        with Path(target).open("a", encoding="utf-8") as file:
            file.writelines(f"{summary(report)}\n" for report in reports)
