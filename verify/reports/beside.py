"""Several candidates against one reference, as one table: an output a row, a candidate a column.

    output  dtype    onnxruntime-cpu  openvino
    y       float32  1.19e-07         2.38e-07
    ids     int64    equal            DIFFERS

A figure is the largest absolute difference of an output that is equal. A candidate that could not be run has a reason
in place of figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_export.verify.reports.findings import Findings, Row
from moe_export.verify.reports.table import figure, shown


def beside(reports: Sequence[Findings], refused: Sequence[tuple[str, str]] = ()) -> str:
    """The table.

    Args:
        reports: One a candidate.
        refused: Candidates that could not be run, each with its reason.
    """
    outputs = {row.output: row.dtype for report in reports for row in shown(report)}
    rows = [["output", "dtype", *(report.candidate for report in reports), *(name for name, _ in refused)]]
    for output, dtype in outputs.items():
        found = [next((row for row in report.rows if row.output == output), None) for report in reports]
        rows.append([output, dtype, *map(_cell, found), *("-" for _ in refused)])
    rows.append(["verdict", "", *(report.verdict for report in reports), *("not run" for _ in refused)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*lines, *(f"\n{name} not run: {reason}" for name, reason in refused)])


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if not row.equal:
        return "DIFFERS"
    return "equal" if math.isnan(row.max_abs) else figure(row.max_abs)
