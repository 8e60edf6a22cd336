"""`moe-export judge report.json --rtol 1e-3`: what a report would say at other tolerances, without running anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moe_export.commands.console import Console
from moe_export.commands.reports import Wanted, write_reports
from moe_export.comparison_settings import check_names, parse_tolerance
from moe_export.errors import UsageError
from moe_export.verify import FlipBudget, show
from moe_export.verify.reports.reading import judge_again, read_report


def run_judge(
    file: str,
    rtol: float | None,
    atol: float | None,
    tolerances: tuple[str, ...],
    flips: str | None,
    console: Console,
    wanted: Wanted,
) -> int:
    """Run the command; the exit code."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is no report: it is no text") from None
    wanted.require_free([Path(file)])
    tolerance = parse_tolerance(rtol, atol, tolerances)
    before = read_report(text)
    check_names(tolerance, [row.output for row in before.rows])
    found = judge_again(before, tolerance, None if flips is None else FlipBudget.parse(flips))
    console.json(json.dumps(found.to_dict(), indent=2))
    if not (console.quiet or console.as_json):
        show(found, sys.stdout, verbose=console.verbose)
    write_reports([found], wanted, console, [Path(file)])
    return found.exit_code
