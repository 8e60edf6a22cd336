"""`moe-export report model.py -o report.html`: one export, verified, as one page that needs nothing else."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

import moe_export
from moe_export.commands.console import Console
from moe_export.commands.diff import figures_of, operators_of, sketches_of
from moe_export.commands.export import run_export
from moe_export.commands.request import ExportRequest
from moe_export.errors import MissingBackendError, UsageError
from moe_export.export.engines.graph_file import read_graph
from moe_export.export.frontend.load import load_subject
from moe_export.export.frontend.subject import Subject
from moe_export.export.gates.dispatch import Dispatch, find_dispatches
from moe_export.export.gates.picture import draw
from moe_export.own_files import put_text, require_free
from moe_export.pictures.differing import usual_sizes
from moe_export.pictures.picture import svg_of
from moe_export.pictures.sketch import sketch_of
from moe_export.reports.baseline import compare_with_baseline
from moe_export.reports.page import Change, Content, Picture, page
from moe_export.reports.reproduce import reproduce_commands
from moe_export.reports.timing import machine, timings_of
from moe_export.running.inputs import inputs_at
from moe_export.verify.cost.graph_cost import cost_of, parts_of

SUFFIX = ".html"
_AWAY = "the weights are read from files, and are not in memory (--memory)"
_PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "tensorrt-rtx-cu13")


def run_report(
    model: str,
    output: str | None,
    graphs: str | None,
    baseline: bool,
    console: Console,
    **options: Any,
) -> int:
    """Run the command; the exit code is that of the export."""
    target = Path(output or f"{Path(model.partition(':')[0]).stem}.report{SUFFIX}")
    if target.suffix != SUFFIX:
        raise UsageError(f"a report is a {SUFFIX} file, not {target}")
    require_free(target, "text", force=options["force"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(graphs or temporary)
        request = ExportRequest.of(
            {**options, "model": model, "output": folder, "console": Console(quiet=True)}
        )
        code = run_export(request)
        stem = Path(model.partition(":")[0]).stem
        document = json.loads((folder / f"{stem}.report.json").read_text(encoding="utf-8"))
        with console.user_code(), console.step("drawing"):
            content = _content(document, request, baseline, options)
    put_text(target, page(content), force=options["force"])
    console.json(json.dumps(document, indent=2))
    console.say(f"{document['model']}: {document['verdict']}")
    console.say(f"written: {target}")
    return code


def _content(
    document: dict[str, Any], request: ExportRequest, baseline: bool, options: dict[str, Any]
) -> Content:
    model, folder = request.model, request.folder
    subject = request.named(
        load_subject(model, init=request.init, inputs=request.inputs, memory=request.memory)
    )
    away = _AWAY if subject.weights is not None and subject.weights.absent else ""
    costs: dict[str, Sequence[tuple[str, int, int, int, int]] | str] = {}
    at: dict[str, str] = {}
    pictures: dict[str, str] = {}
    for number, entry in enumerate(document["graphs"]):
        file = entry["file"]
        graph, _ = read_graph(folder / file)
        sizes = usual_sizes(graph)
        at[file] = " ".join(f"{name}={size}" for name, size in sizes.items())
        costs[file] = away or _cost(folder / file, graph, sizes)
        pictures[file] = svg_of([sketch_of(graph, file)], ident=f"graph-{number}")
    whole = document["graphs"][0]
    return Content(
        document,
        costs,
        at,
        pictures,
        [] if away else _routings(subject),
        reproduce_commands(model, whole["file"], options),
        _versions(document, model, folder),
        (away or _change(subject, folder / whole["file"], request)) if baseline else None,
        away or _timings(subject, folder, whole, request.provider),
        machine(),
    )


def _change(subject: Subject, after: Path, request: ExportRequest) -> Change | str:
    """What the rewriting changed."""
    with tempfile.TemporaryDirectory() as folder:
        found = compare_with_baseline(
            subject, after, Path(folder), request.options.opset, request.dynamic, request.static
        )
        if isinstance(found, str):
            return found
        sketches, marks, words = sketches_of(found)
        picture = svg_of(sketches, marks, ident="change", head=words)
        at = " ".join(f"{name}={size}" for name, size in found.after.sizes.items())
        return Change(figures_of(found), operators_of(found), picture, at)


def _timings(
    subject: Subject, folder: Path, entry: dict[str, Any], provider: str
) -> Sequence[tuple[str, int, float]] | str:
    if entry["dtype"] != "float32":
        return f"not measured: onnxruntime's CPU has few kernels for {entry['dtype']}"
    try:
        return timings_of(subject, folder / entry["file"], provider)
    except Exception as error:  # whatever an engine says
        return f"not measured: {str(error).strip().splitlines()[0]}"


def _cost(
    path: Path, graph: ir.Model, sizes: dict[str, int]
) -> Sequence[tuple[str, int, int, int, int]] | str:
    """All of a graph and its parts."""
    try:
        proto = onnx.load(path)
        cost = cost_of(proto, inputs_at(graph, sizes), parts_of(proto))
    except Exception as error:  # whatever ONNX Runtime says of the graph
        return str(error).strip().splitlines()[0]
    return [
        (name, work.nodes, work.flops, work.weight_bytes, work.activation_bytes)
        for name, work in [("all", cost.total), *cost.blocks.items()]
    ]


def _routings(subject: Subject) -> list[Picture]:
    pictures = []
    for dispatch in find_dispatches(subject):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "routing.svg"
            try:
                draw([dispatch], path)
            except MissingBackendError:
                return []  # matplotlib is an extra
            pictures.append(Picture(path.read_text(encoding="utf-8"), _words(dispatch), _caption(dispatch)))
    return pictures


def _words(dispatch: Dispatch) -> str:
    loads = ", ".join(f"expert {expert} gets {load}" for expert, load in enumerate(dispatch.loads))
    return f"Which of {len(dispatch.indices)} tokens goes to which of {dispatch.experts} experts: {loads}"


def _caption(dispatch: Dispatch) -> str:
    """What the picture tells of the load."""
    loads = dispatch.loads
    even = dispatch.indices.size / dispatch.experts
    idle = int((loads == 0).sum())
    fullest = f"the fullest expert has {loads.max(initial=0) / even:.2g} times an even load" if even else ""
    return ", ".join(
        filter(
            None,
            (f"{dispatch.path}: the example inputs", fullest, f"{idle} experts have none" if idle else ""),
        )
    )


def _versions(document: dict[str, Any], model: str, folder: Path) -> dict[str, str]:
    found = {"moe-export": moe_export.__version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["machine"] = machine()
    source = Path(model.partition(":")[0])
    files = [source, *(folder / entry["file"] for entry in document["graphs"])]
    return found | {
        f"SHA-256 of {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }
