"""The results as a page, and into docs/gpu.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
MARKS = ("<!-- results -->\n", "<!-- /results -->")
WRONG = 1e-4
"""Of the largest value: beyond it a graph is not the model's. TF32, which is off, would be at 1e-3."""


def render(document: Mapping[str, Any]) -> str:
    """All parts as Markdown."""
    versions = ", ".join(f"{name} {found}" for name, found in document["versions"].items())
    lines = [
        f"**{document['device']}**: {document['flops_per_second'] / 1e12:.3g} TFLOP/s in float32, "
        f"{document['bytes_per_second'] / 1e9:.3g} GB/s, measured; {document['seconds']:.0f} s in all. {versions}.",
        "",
    ]
    for name, part in document["parts"].items():
        lines += [f"### {name.capitalize()}", "", *_PARTS[name](part["rows"]), ""]
        if part["cut"]:
            lines += ["Cut, as the time was over: " + "; ".join(part["cut"]) + ".", ""]
    return "\n".join(lines)


def store(text: str) -> None:
    """Put the page between the two marks of docs/gpu.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + text + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")


def failed(document: Mapping[str, Any]) -> bool:
    """Whether a test failed, a graph is wrong, or an engine is not equal."""
    parts = document["parts"]
    tests = any(row["outcome"] in ("failure", "error") for row in parts.get("tests", {"rows": []})["rows"])
    rows = [
        row for name in ("models", "experts", "recurrences") for row in parts.get(name, {"rows": []})["rows"]
    ]
    wrong = any(found > WRONG for row in rows for found in row.get("differences", {}).values())
    return (
        tests
        or wrong
        or any(row["status"] == "not equal" for row in parts.get("engines", {"rows": []})["rows"])
    )


def _tests(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    yield ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "none"
    yield ""
    yield from (
        f"- {row['outcome']}: `{row['test']}`{_why(row)}" for row in rows if row["outcome"] != "passed"
    )


def _why(row: Mapping[str, Any]) -> str:
    return f": {row['reason']}" if row["reason"] else ""


def _times(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    rows = [row for row in rows if row["ms"]]  # a size that was cut is named below
    first = ("eager", "torch.compile")
    columns = [*first, *dict.fromkeys(name for row in rows for name in row["ms"] if name not in first)]
    yield (
        "| | sizes | roofline ms | "
        + " | ".join(f"{name} ms" for name in columns)
        + " | largest difference |"
    )
    yield "|" + "---|" * (len(columns) + 4)
    for row in rows:
        cells = [f"{row['ms'][name]:.3g}" if name in row["ms"] else "-" for name in columns]
        bound = f"{row['bound_ms']:.3g}" if row.get("bound_ms") else "-"
        worst = max(row.get("differences", {}).values(), default=float("nan"))
        yield f"| {row['graph']} | {row['sizes']} | {bound} | {' | '.join(cells)} | {worst:.0e} |"
    reasons = {f"{row['graph']}: {name}: {why}" for row in rows for name, why in row["reasons"].items()}
    if reasons:
        yield ""
        yield from (f"- not measured, {reason}" for reason in sorted(reasons))


def _engines(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    yield "| | builder | status | seconds | largest difference |"
    yield "|---|---|---|---|---|"
    for row in rows:
        worst = row.get("largest difference")
        cells = (
            row["graph"],
            row["builder"],
            row["status"],
            row.get("seconds", "-"),
            "-" if worst is None else f"{worst:.0e}",
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


_PARTS = {"tests": _tests, "models": _times, "experts": _times, "recurrences": _times, "engines": _engines}
