"""A report as one HTML file: no script, no other file, light and dark; differences as histograms in SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from moe_export.own_files import MARK
from moe_export.verify.judging.error_model import TIMES
from moe_export.verify.reports.findings import CaseResult, Row
from moe_export.verify.reports.report import Report, worst_code
from moe_export.verify.reports.table import errors, figure, too_far

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #667; --line: #d5d9e0; --bar: #3b6ea5;
        --good: #18794e; --bad: #c2261c; --doubt: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #14171b; --faint: #98a0ab; --line: #333a44; --bar: #7fb2e5; --good: #4cc38a;
          --bad: #ff6b5e; --doubt: #e2b340; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 64rem; padding: 0 1rem; overflow-wrap: break-word; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .doubt { color: var(--doubt); }
.faint, small { color: var(--faint); } code { font-size: .9em; } svg { display: block; max-width: 100%; height: auto; }
@media (max-width: 48rem) { table { display: block; overflow-x: auto; } }
svg rect { fill: var(--bar); } svg line { stroke: var(--bad); stroke-dasharray: 3 2; }
svg text { fill: var(--faint); font-size: 10px; }
"""
_COLOURS = {"equal": "good", "not equal": "bad", "not proven": "doubt", "unfinished": "doubt"}
_WIDTH, _HEIGHT, _FOOT = 420, 90, 16


def page(reports: Sequence[Report]) -> str:
    """The page of some reports."""
    body = "\n".join(line for report in reports for line in _report(report))
    code = worst_code(reports)
    worst = next((report.verdict for report in reports if report.exit_code == code), "nothing compared")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<!-- {MARK} -->\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(worst)} - moe-export verify</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _report(report: Report) -> Iterator[str]:
    colour = _COLOURS[report.verdict]
    title = escape(f"{report.candidate} against {report.reference}")
    yield f'<h1>{title}: <span class="{colour}">{report.verdict}</span></h1>'
    if report.shortfall:
        yield f'<p class="doubt">{escape(report.shortfall)}</p>'
    yield (
        "<p>"
        + "<br>".join(f"{escape(k)}: <code>{escape(v)}</code>" for k, v in report.about.items())
        + "</p>"
    )
    if report.claims:
        yield f"<p>compared at {', '.join(map(escape, report.claims))}</p>"
    yield (
        "<h2>Outputs</h2><table><tr><th>output</th><th>dtype</th>"
        + "".join(f'<th class="number">{name}</th>' for name in ("max abs", "max rel", "flips"))
        + "<th>worst at</th><th>verdict</th></tr>"
    )
    yield from (_row(row) for row in report.rows)
    yield "</table>"
    yield from _standings(report)
    if report.warnings:
        yield "<h2>Warnings</h2><ul>"
        yield from (f'<li class="doubt">{escape(warning)}</li>' for warning in report.warnings)
        yield "</ul>"
    yield "<h2>Differences</h2>"
    yield from (_histogram(report, row) for row in report.rows if row.kind == "float")
    yield "<h2>Cases</h2><table><tr><th>case</th><th>sizes</th><th>seed</th><th>outcome</th></tr>"
    yield from (_case(case) for case in report.cases)
    for label in report.left_out:
        yield f'<tr><td>{escape(label)}</td><td></td><td></td><td class="doubt">not compared: time limit</td></tr>'
    yield "</table>"


def _row(row: Row) -> str:
    verdict = (
        '<span class="good">equal</span>'
        if row.equal
        else f'<span class="bad">differs</span><br><small>{escape(row.reason or "")}</small>'
    )
    numbers = "".join(
        f'<td class="number">{text}</td>' for text in (figure(row.max_abs), figure(row.max_rel), row.flips)
    )
    return (
        f"<tr><td><code>{escape(row.output)}</code></td><td>{escape(row.dtype)}</td>{numbers}"
        f"<td>{escape(row.at)}</td><td>{verdict}</td></tr>"
    )


def _standings(report: Report) -> Iterator[str]:
    """The errors of candidate and reference against a float64 run, for outputs beyond their tolerance."""
    if not report.by_float64:
        return
    yield (
        "<h2>By float64</h2><p>These outputs are beyond their tolerance somewhere. An error is right where it is at "
        f"most {TIMES:g} times that of {escape(report.reference)} in the same row.</p>"
        "<table><tr><th>output</th><th>tolerance</th>"
        + "".join(
            f'<th class="number">{name}</th>'
            for name in ("own error", f"{escape(report.reference)}'s", "ratio")
        )
        + "<th>at</th></tr>"
    )
    for label, judgement in report.by_float64:
        assert judgement.standing is not None
        numbers = errors(judgement.standing)
        yield (
            f"<tr><td><code>{escape(judgement.output)}</code></td><td>{escape(str(judgement.margin))}</td>"
            + "".join(f'<td class="number">{number}</td>' for number in numbers)
            + f"<td>{escape(label)}</td></tr>"
        )
    yield "</table>"
    yield from (f"<p>{escape(line)}</p>" for line in too_far(report))


def _case(case: CaseResult) -> str:
    wrong = [judgement for judgement in case.judgements if not judgement.ok]
    undecided = [judgement for judgement in case.judgements if judgement.undecided]
    if case.outcome == "failed" or wrong:
        reasons = (
            [case.reason or ""] if case.outcome == "failed" else [f"{j.output}: {j.reason}" for j in wrong]
        )
        outcome = f'<span class="bad">{escape("; ".join(reasons))}</span>'
    elif case.outcome == "refused":
        outcome = f'<span class="faint">refused by the reference: {escape(case.reason or "")}</span>'
    elif case.outcome == "no memory":
        outcome = f'<span class="doubt">not compared: {escape(case.reason or "")}</span>'
    elif undecided:
        outcome = f'<span class="doubt">undecided: {escape(undecided[0].undecided or "")}</span>'
    else:
        outcome = '<span class="good">equal</span>'
    sizes = " ".join(f"{name}={size}" for name, size in case.sizes)
    return f"<tr><td>{escape(case.label)}</td><td>{escape(sizes)}</td><td>{case.seed}</td><td>{outcome}</td></tr>"


def _histogram(report: Report, row: Row) -> str:
    """How many elements differ by how much, over all cases; a dashed line at the absolute tolerance."""
    counts: dict[int, int] = {}
    total, atol = 0, 0.0
    for judgement in (j for case in report.compared for j in case.judgements if j.output == row.output):
        total += judgement.total
        atol = max(atol, judgement.margin.atol if judgement.margin else 0.0)
        for decade, count in judgement.decades:
            counts[decade] = counts.get(decade, 0) + count
    same = total - sum(counts.values())
    title = (
        f"<h3><code>{escape(row.output)}</code></h3><p class='faint'>{same} of {total} elements do not differ"
    )
    if not counts:
        return f"{title}.</p>"
    low, high = min(counts), max(counts)
    step = _WIDTH / max(high - low + 1, 1)
    tallest = max(counts.values())
    bars = "".join(
        f'<rect x="{(decade - low) * step + 1:.1f}" y="{_HEIGHT - _tall(count, tallest):.1f}" '
        f'width="{max(step - 2, 1):.1f}" height="{_tall(count, tallest):.1f}">'
        f"<title>{count} elements from 1e{decade} to 1e{decade + 1}</title></rect>"
        f'<text x="{(decade - low) * step + 2:.1f}" y="{_HEIGHT + 12}">1e{decade}</text>'
        for decade, count in sorted(counts.items())
    )
    return (
        f"{title}; the others, by the size of the difference:</p>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT + _FOOT}" viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}" role="img" '
        f'aria-label="histogram of the differences of {escape(row.output, quote=True)}">'
        f"{bars}{_limit(atol, low, high, step)}</svg>"
    )


def _tall(count: int, tallest: int) -> float:
    return 4 + (_HEIGHT - 14) * count / tallest


def _limit(atol: float, low: int, high: int, step: float) -> str:
    from math import log10

    if atol <= 0 or not low <= log10(atol) <= high + 1:
        return ""
    x = (log10(atol) - low) * step
    return f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{_HEIGHT}"><title>atol {atol:g}</title></line>'
