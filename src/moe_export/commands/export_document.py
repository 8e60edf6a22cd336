"""The report of an export as plain data: `MODEL.report.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, TypedDict

import moe_export
from moe_export.commands.build import EngineEntry
from moe_export.comparing.packing_effect import Effect, EffectEntry, Limits
from moe_export.export.frontend.subject import Subject
from moe_export.export.onnx.provenance import relative_line
from moe_export.export.parallel.manifest import DimEntry
from moe_export.export.pipeline import Graph
from moe_export.verify import Report
from moe_export.verify.reports.findings import Verdict
from moe_export.verify.reports.report import ReportDocument

SCHEMA: Final = "moe-export/export-report/1"
PLACE = re.compile(r"(?<![\w.])/[^\s:]+\.py:\d+")  # absolute: `../lib/loop.py:3` is somebody's already
ExportVerdict = Verdict | Literal["not verified", "beyond limits"]
"""`beyond limits`: equal to what its packed weights say, which is further from the model than the user allows."""


class FixedEntry(TypedDict):
    """A size that is one number in the graph, and whether the model itself takes others."""

    input: str
    axis: int
    size: int
    model_takes_others: bool
    line: str


class EinsumEntry(TypedDict):
    """An einsum of the model, and what it became."""

    file: str | None
    line: int | None
    module: str
    equation: str
    became: str
    flops: str
    largest: str


class _Graph(TypedDict):
    file: str
    kind: str
    module: str
    dtype: str
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    dynamic: list[DimEntry]
    conditions: list[str]
    fixed: list[FixedEntry]
    nodes: int
    operators: dict[str, int]
    einsums: list[EinsumEntry]
    notes: list[str]
    verification: ReportDocument | None


class GraphEntry(_Graph, total=False):
    """A graph that was written: what goes in and out, for which sizes, and whether it is equal to the model."""

    engines: list[EngineEntry]
    packing: EffectEntry


class RanksEntry(TypedDict):
    """The graphs of ranks, whose manifest is a file of its own, and whether together they are the whole graph."""

    manifest: str
    ranks: int
    exchange: str
    bytes: list[int]
    notes: list[str]
    verification: ReportDocument | None


class _Export(TypedDict):
    schema: Literal["moe-export/export-report/1"]
    version: str
    source: str
    model: str
    found_by: str
    opset: int
    verdict: ExportVerdict
    graphs: list[GraphEntry]


class ExportDocument(_Export, total=False):
    """What was exported, and whether it is equal to the model: `MODEL.report.json`."""

    parallel: RanksEntry


def report_document(
    subject: Subject,
    graphs: tuple[Graph, ...],
    names: list[str],
    reports: list[Report | None],
    effects: list[Effect | None],
    opset: int,
    limits: Limits,
) -> ExportDocument:
    """The report of an export as plain data, for `model.report.json` and `--json`."""
    verdict = verdict_of(reports)
    if verdict == "equal" and any(effect is not None and effect.beyond(limits) for effect in effects):
        verdict = "beyond limits"
    return {
        "schema": SCHEMA,
        "version": moe_export.__version__,
        "source": subject.source.name,
        "model": type(subject.module).__name__,
        "found_by": subject.how,
        "opset": opset,
        "verdict": verdict,
        "graphs": [
            _graph_document(graph, name, report, effect)
            for graph, name, report, effect in zip(graphs, names, reports, effects, strict=True)
        ],
    }


def verdict_of(reports: Sequence[Report | None]) -> ExportVerdict:
    """The worst verdict of some comparisons; None for one that was not made."""
    verdicts: set[ExportVerdict] = {report.verdict if report else "not verified" for report in reports}
    order: tuple[ExportVerdict, ...] = ("not equal", "unfinished", "not proven", "not verified", "equal")
    return next(verdict for verdict in order if verdict in verdicts)


def given_away(note: str, folder: Path) -> str:
    """A note without absolute paths: a report is given to others."""
    return PLACE.sub(lambda place: relative_line(place[0], folder), note)


def _graph_document(graph: Graph, name: str, report: Report | None, effect: Effect | None) -> GraphEntry:
    entry = _entry(graph, name, report)
    if effect is not None:
        entry["packing"] = effect.to_dict()
    return entry


def _entry(graph: Graph, name: str, report: Report | None) -> GraphEntry:
    operators: dict[str, int] = {}
    for node in graph.model.graph.all_nodes():
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return {
        "file": name,
        "kind": graph.kind,
        "module": graph.path,
        "dtype": graph.dtype,
        "inputs": {name: list(shape) for name, shape in graph.traced.inputs.items()},
        "outputs": {
            str(value.name): [str(dim) if not isinstance(dim, int) else dim for dim in value.shape or ()]
            for value in graph.model.graph.outputs
        },
        "dynamic": [
            {"name": dim.name, "traced": dim.traced, "minimum": dim.minimum, "maximum": dim.maximum}
            for dim in graph.traced.dims
        ],
        "conditions": [str(condition) for condition in graph.traced.conditions],
        "fixed": [
            {
                "input": f.input,
                "axis": f.axis,
                "size": f.size,
                "model_takes_others": f.model_takes_others,
                "line": given_away(f.line, graph.reference.source.parent),
            }
            for f in graph.traced.fixed
        ],
        "nodes": sum(operators.values()),
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "einsums": [
            {
                "file": site.file and Path(site.file).name,
                "line": site.line,
                "module": site.module,
                "equation": site.equation,
                "became": site.became,
                "flops": str(site.flops),
                "largest": str(site.largest),
            }
            for site in graph.sites
        ],
        "notes": [given_away(note, graph.reference.source.parent) for note in graph.notes],
        "verification": report.to_dict() if report else None,
    }
