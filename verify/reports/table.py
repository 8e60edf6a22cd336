"""A report as text: plain, at most 100 columns wide; or in colour, as wide as the terminal."""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from moe_export.verify.inputs.regimes import NORMAL
from moe_export.verify.judging.error_model import ANOTHER_WAY, TIMES
from moe_export.verify.judging.judge import Standing
from moe_export.verify.judging.replay import is_choice
from moe_export.verify.reports.findings import PART, CaseResult, Findings, Outcome, Row
from moe_export.verify.runner import shorten

if TYPE_CHECKING:
    from rich.console import Group

WIDTH = 100
_HEADER = ("output", "dtype", "max abs", "max rel", "at", "verdict")
_RIGHT = (2, 3)  # columns of figures
_LIMITS = (28, 14, 9, 9, 24, 9)  # with a gap of 1 between them, exactly within WIDTH
_STANDING_LIMITS = (28, 21, 9, 9, 6, 22)
_REPRODUCE = "reproduce: "
_NUMBER = re.compile(r"\d+")
_MOST_LABELS = 5  # of sizes at which the same went wrong
_COLOURS = {"equal": "green", "not equal": "red", "not proven": "yellow", "unfinished": "yellow"}


def plain(report: Findings, *, verbose: bool = False) -> str:
    """The report as plain text: verdict, a table of outputs, sizes, refusals, worst elements.

    Args:
        report: What was found.
        verbose: List every size that was compared, refused or failed, by the label that `--case` takes.
    """
    cells = [_HEADER, *(_cells(row) for row in shown(report))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER))]
    lines = [_headline(report), ""]
    if report.rows:
        lines += [_aligned(line, widths) for line in cells] + [""]
    if report.by_float64:
        lines += [*_standings(report), ""]
    notes = [line for note in _paragraphs(report, verbose=verbose) for line in _wrapped(note)]
    return "\n".join([*lines, *notes])


def rich_report(report: Findings, *, verbose: bool = False) -> Group:
    """The same for a rich console, which colours it and fits it to the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column, title in enumerate(_HEADER):
        table.add_column(title, justify="right" if column in _RIGHT else "left")
    for row in shown(report):
        colour = "green" if row.equal else "red"
        *cells, verdict = _cells(row)
        table.add_row(*map(Text, cells), Text(verdict, style=colour))
    headline = Text(_headline(report), style=f"bold {_COLOURS[report.verdict]}")
    standings = [Text("\n".join(_standings(report))), Text()] if report.by_float64 else []
    notes = [
        Text(note, no_wrap=note.startswith(_REPRODUCE), overflow="ignore")  # a command is copied as it stands
        for note in _paragraphs(report, verbose=verbose)
    ]
    return Group(headline, Text(), table, Text(), *standings, *notes)


def show(report: Findings, stream: TextIO, *, verbose: bool = False) -> None:
    """Write the report to `stream`: in colour if it is a terminal, as plain text if not."""
    if stream.isatty():
        from rich.console import Console

        Console(file=stream).print(rich_report(report, verbose=verbose))
    else:
        stream.write(plain(report, verbose=verbose) + "\n")


def shown(report: Findings) -> tuple[Row, ...]:
    """The outputs, and of the choices inside the model those that are wrong."""
    return tuple(row for row in report.rows if not (row.equal and is_choice(row.output)))


def _headline(report: Findings) -> str:
    against = f"{report.about[PART]} ({report.reference})" if PART in report.about else report.reference
    if report.verdict == "equal":
        return shorten(f"{report.candidate} matches {against}{_within(report)}", WIDTH)
    why = f" ({report.shortfall})" if report.verdict in {"not proven", "unfinished"} else ""
    return shorten(f"{report.candidate} against {against}: {report.verdict}{why}", WIDTH)


def _within(report: Findings) -> str:
    """The tolerance, if all outputs have one."""
    found = {judgement.margin for case in report.compared for judgement in case.judgements} - {None}
    return f" ({found.pop()})" if len(found) == 1 else ""


def _cells(row: Row) -> tuple[str, ...]:
    verdict = "equal" if row.equal else "DIFFERS"
    cells = (row.output, row.dtype, figure(row.max_abs), figure(row.max_rel), row.at, verdict)
    return tuple(shorten(cell, limit) for cell, limit in zip(cells, _LIMITS, strict=True))


def figure(value: float) -> str:
    """Three digits; a dash where there is nothing to measure."""
    if math.isnan(value):
        return "-"
    return "0" if value == 0 else f"{value:.2e}"


def _standings(report: Findings) -> list[str]:
    """Outputs beyond their tolerance, and the errors of both against the model in float64."""
    lines = [("by float64", "tolerance", "own error", f"{report.reference}'s", "ratio", "at")]
    for label, judgement in report.by_float64:
        standing = judgement.standing
        assert standing is not None
        lines.append((judgement.output, str(judgement.margin), *errors(standing), label))
    lines = [tuple(map(shorten, line, _STANDING_LIMITS)) for line in lines]  # type: ignore[misc]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        *(_aligned(line, widths) for line in lines),
        f"equal where an error is at most {TIMES:g} times that of {report.reference} in the same row",
        *too_far(report),
    ]


def errors(standing: Standing) -> tuple[str, str, str]:
    """The candidate's error, the reference's and their ratio; no ratio where the reference's excuses nothing."""
    if standing.another_way is not None:
        return figure(standing.own), f"{standing.another_way:.2e}!", "-"
    ratio = f"{standing.ratio:.1f}" if standing.ratio < 1000 else "> 1000"
    return figure(standing.own), figure(standing.theirs), ratio


def too_far(report: Findings) -> Iterator[str]:
    """What an exclamation mark beside the reference's error means, where there is one."""
    if any(judgement.standing and judgement.standing.another_way for _, judgement in report.by_float64):
        yield f"!: {report.reference} itself is more than {ANOTHER_WAY:.0%} of the largest value off, which excuses"
        yield "nothing: the result of the model depends on the order of its sums, or on a branch"


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    pairs = enumerate(zip(cells, widths, strict=True))
    return " ".join(c.rjust(w) if i in _RIGHT else c.ljust(w) for i, (c, w) in pairs).rstrip()


def _paragraphs(report: Findings, *, verbose: bool) -> Iterator[str]:
    yield _compared(report)
    if verbose and report.compared:
        yield "compared: " + _labels(report.compared)
    if report.left_out:
        yield f"NOT COMPARED, the time limit was reached: {'; '.join(report.left_out)}"
    for reason, labels in _reasons(report, "refused").items():
        yield f"refused by {report.reference}, {_first(labels, verbose)}: {reason}"
    for reason, labels in _reasons(report, "no memory").items():
        yield f"not compared, {_first(labels, verbose)}: {reason}"
    for reason, labels in _reasons(report, "failed").items():
        yield f"FAILED in {report.candidate} only, {_first(labels, verbose)}: {reason}"
    for row in report.rows:
        if not row.equal:
            yield f"{row.output} DIFFERS, {row.at}: {row.reason}{_worst(row, report)}"
    yield from _reproduce(report)
    if report.flips:
        yield f"{report.flips} tied tokens routed to an equally scored expert (allowed)"
    yield from (f"warning: {warning}" for warning in report.warnings)


def _compared(report: Findings) -> str:
    """`64 size combinations: batch 1..513, sequence 1..4096; also with zeros, large values; seed 0`."""
    count = len({case.sizes for case in report.compared})
    sizes = f"{count} size combination{'' if count == 1 else 's'}"
    ranges = ", ".join(report.claims)
    kinds = dict.fromkeys(case.regime for case in report.compared if case.regime != NORMAL)
    values = [f"also with {', '.join(kinds)}"] if kinds else []
    return "; ".join([f"{sizes}: {ranges}" if ranges else sizes, *values, _seeds(report)])


def _seeds(report: Findings) -> str:
    seeds = sorted({case.seed for case in report.cases}) or [0]
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def _reproduce(report: Findings) -> Iterator[str]:
    """How to reproduce the first case that differs."""
    wrong = [
        case for case in report.cases if case.outcome == "failed" or not all(j.ok for j in case.judgements)
    ]
    if wrong and "command" in report.about:
        case, about = wrong[0], report.about
        words = [about["command"], f"--against {about['reference']}", f"--seed {case.seed}"]
        yield _REPRODUCE + " ".join([*words, f"--case {shlex.quote(case.label)}"])


def _reasons(report: Findings, outcome: Outcome) -> dict[str, list[str]]:
    """The cases with this outcome by error message: one mistake often shows at many sizes.

    Messages that differ in numbers alone tell of one mistake; the first of them stands for all.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for case in report.cases:
        if case.outcome == outcome:
            reason = case.reason or ""
            alike = found.setdefault(_NUMBER.sub("#", reason), {})
            alike.setdefault(reason, []).append(case.label)
    return {
        next(iter(alike)) + (" (likewise with other numbers)" if len(alike) > 1 else ""): [
            label for labels in alike.values() for label in labels
        ]
        for alike in found.values()
    }


def _first(labels: list[str], verbose: bool) -> str:
    """The first labels, as what is wrong everywhere is so at a hundred sizes; the JSON has all."""
    shown = labels if verbose or len(labels) <= _MOST_LABELS + 1 else labels[:_MOST_LABELS]
    more = len(labels) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _worst(row: Row, report: Findings) -> str:
    if row.worst is None or row.kind == "routing":  # a routing reason names its token already
        return ""
    index = f"[{', '.join(map(str, row.worst.index))}]" if row.worst.index else ""
    ours, theirs = _value(row.worst.candidate), _value(row.worst.reference)
    return f"; worst {row.output}{index} is {ours}, {report.reference} has {theirs}"


def _value(value: object) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _labels(cases: tuple[CaseResult, ...]) -> str:
    """The labels; the example's sizes are spelt out, as the other labels are sizes already."""
    sizes = " ".join(f"{name}={size}" for name, size in cases[0].sizes)
    labels = [case.label for case in cases]
    if sizes and labels[0] != sizes:
        labels[0] += f" ({sizes})"
    return "; ".join(dict.fromkeys(labels))  # new values of several seeds have one label


def _wrapped(paragraph: str) -> list[str]:
    if paragraph.startswith(_REPRODUCE):
        return [paragraph]  # a command is copied as it stands
    return textwrap.wrap(paragraph, WIDTH, subsequent_indent="  ", break_on_hyphens=False) or [""]
