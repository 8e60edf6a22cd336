"""`moe-export model.py`: load, export, verify in a staging folder, then move the files into place."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from moe_export.commands.build import EngineEntry, Request, build_files, check_names, engine_lines, exit_code
from moe_export.commands.calls import list_calls
from moe_export.commands.console import Console
from moe_export.commands.export_document import PLACE, ExportDocument, report_document, verdict_of
from moe_export.commands.parallel import Written, write_ranks
from moe_export.commands.reports import write_reports
from moe_export.commands.request import ExportRequest
from moe_export.commands.stopped import show_stage
from moe_export.comparing.apart import fork_model
from moe_export.comparing.checking import verify_graph
from moe_export.comparing.layerwise_exports import Parts, Verified, effect_by_runs
from moe_export.comparing.packing_effect import Effect, Limits, effect_of
from moe_export.comparing.verifying_models import line_of
from moe_export.comparison_settings import check_names as check_outputs
from moe_export.einsum_rewrite import Site
from moe_export.errors import Code, MissingBackendError, NotExportableError, UsageError
from moe_export.export.decoder.genai import FILE as GENAI
from moe_export.export.decoder.genai import genai_config
from moe_export.export.decoder.whole import DecoderModule
from moe_export.export.engines.profiles import dim_facts
from moe_export.export.engines.shape_inputs import range_names
from moe_export.export.frontend.load import load_subject, split_spec
from moe_export.export.frontend.pretrained import is_pretrained, tokenizer_files
from moe_export.export.frontend.subject import Subject
from moe_export.export.onnx.bodies import initializers
from moe_export.export.onnx.external_weights import Storage, data_facts, referable, stream_weights
from moe_export.export.onnx.functions import as_functions
from moe_export.export.onnx.provenance import strip_scope
from moe_export.export.onnx.recipes import without_weights
from moe_export.export.onnx.serialize import rename_model, staging, write_model
from moe_export.export.options import Options
from moe_export.export.parallel.ranks import Parallel, check_experts
from moe_export.export.pipeline import Graph, describe, export_subject, is_only_a_gate
from moe_export.export.tracing.trace import SCOPE
from moe_export.exported import facts_of, summary
from moe_export.external_data import ReadAhead
from moe_export.large.layerwise import filled_weights
from moe_export.own_files import require_free
from moe_export.running.choices import runner_of
from moe_export.supervisor import exporting
from moe_export.verify import Report
from moe_export.verify import show as show_report
from moe_export.verify.reports.report import worst_code

_NO_KERNEL = re.compile(r"Could not find an implementation for (?P<op>\w+)")


def run_export(request: ExportRequest) -> int:
    """Run the command; the exit code."""
    console = request.console
    if request.list_calls:
        return list_calls(request.model, console)
    with console.user_code(), _place(request) as temporary, ReadAhead() as ahead:
        with console.step(f"loading {request.model}"):
            subject = _loaded(request, ahead)
        options = request.options_for(subject)
        if request.stop_after is not None:
            return show_stage(request.stop_after, subject, options, console, show=request.show)
        graphs = _exported(subject, options, request.parallel, console)
        if request.engines is not None:
            check_names(request.engines, (name for graph in graphs for name in range_names(graph.model)))
        names = file_names(subject.source.stem, graphs)
        reports: list[Report | None] = []
        checked: list[Graph] = []
        effects: list[Effect | None] = []
        for graph, name in zip(graphs, names, strict=True):
            found, report, effect = _checked(
                graph, temporary / name, facts_of(graph, subject, options), request
            )
            checked.append(found)
            reports.append(report)
            effects.append(effect)
        graphs = tuple(checked)
        if reports[0] is not None:
            outputs = [row.output for report in reports if report is not None for row in report.rows]
            check_outputs(request.tolerance, outputs)
        beyond = [line for effect in effects if effect is not None for line in effect.beyond(request.limits)]
        equal = not beyond and all(report is None or report.exit_code == 0 for report in reports)
        if not equal:
            names = [_reject(temporary, name) for name in names]
        document = report_document(subject, graphs, names, reports, effects, options.opset, request.limits)
        built = _build(request.engines if equal else None, document, temporary, console)
        ranks: Written | None = None
        if request.parallel is not None and equal:
            margins = request.tolerance if request.verify else None
            ranks = write_ranks(
                graphs[0], options, request.parallel, temporary, names[0], console, margins, request.seed
            )
            document["parallel"] = ranks.document
            equal = ranks.report is None or ranks.report.exit_code == 0
        report_name = f"{subject.source.stem}.report.json"
        (temporary / report_name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        beside = _for_runtimes(graphs[0], subject, temporary, names[0]) if equal else []
    console.json(json.dumps(document, indent=2))
    console.say(f"\nmodel: {type(subject.module).__name__}, {subject.how}")
    _print(console, request.folder, graphs, [*names, *beside, report_name], reports)
    for line in beyond:
        console.say(f"PACKED TOO FAR: {line}; the graphs are kept as *.rejected.onnx to look into.")
    write_reports(_located(reports, names, subject), request.wanted, console, [split_spec(request.model)[0]])
    for line in (*engine_lines(built, request.folder), *(ranks.lines if ranks is not None else ())):
        console.say(line)
    if request.engines is not None and equal:
        return exit_code(request.engines, built, console)
    return 0 if equal else worst_code(report for report in reports if report is not None) or 1


def _checked(
    graph: Graph, path: Path, facts: dict[str, str], request: ExportRequest
) -> tuple[Graph, Report | None, Effect | None]:
    """Write a graph and verify it: with what was learned of it, the report, and what packing its weights did."""
    console, storage = request.console, request.storage
    written = replace(graph, notes=(*graph.notes, *_write(graph, path, facts, request.functions, storage)))
    _check_file(path)
    with console.step(f"verifying {path.name}" if request.verify else f"loading {path.name}"):
        checked = _verified(written, path, request)
    found, report = checked.graph, checked.report
    learned = _learned(graph, found)
    if learned:
        _write(found, path, facts | learned, request.functions, storage)
    effect = _effect(checked, request)
    if effect is not None:
        found = replace(found, notes=(*found.notes, *effect.lines()))
    elif graph.quantized is not None and request.limits != Limits() and report is None:
        raise UsageError(
            "--max-error and --max-flips are about what the graph gives, and it was not run",
            hint="--compare whole, if there is memory for the weights in float; without --no-verify",
        )
    return found, report, effect


def _located(reports: Sequence[Report | None], names: Sequence[str], subject: Subject) -> list[Report]:
    """The reports with what is compared, and the line of the model: for programs that point at it."""
    model = {"reference": subject.source.name, **line_of(subject)}
    return [
        replace(report, about={**report.about, "candidate": name, **model})
        for report, name in zip(reports, names, strict=False)
        if report is not None
    ]


def _place(request: ExportRequest) -> AbstractContextManager[Path]:
    """Where the files are written, if any are; that another is in the way is said before hours of work, not after."""
    if request.stop_after is not None:
        return nullcontext(request.folder)
    path, _ = split_spec(request.model)
    request.wanted.require_free([path])
    stem = "model" if path.is_dir() else path.stem
    for name, kind in ((f"{stem}.onnx", "graph"), (f"{stem}.report.json", "report")):
        require_free(request.folder / name, kind, inputs=(path,), force=request.force)
    return staging(request.folder.absolute(), inputs=(path,), force=request.force)


def _loaded(request: ExportRequest, ahead: ReadAhead) -> Subject:
    """The model; files that its graphs may point to are read for their checksums from now on."""
    subject = request.named(
        load_subject(
            request.model, init=request.init, inputs=request.inputs, memory=request.memory, apart=fork_model
        )
    )
    if subject.weights is not None and subject.weights.absent:
        ahead.read(referable(subject.weights.files, request.storage))
    return subject


def _exported(
    subject: Subject, options: Options, parallel: Parallel | None, console: Console
) -> tuple[Graph, ...]:
    """The graphs; that they cannot be split over ranks is said before anything is written or run."""
    exporting()
    graphs = export_subject(subject, options, console.step)
    if parallel is not None:
        check_experts(graphs[0], options, parallel)
    return graphs


def _write(
    graph: Graph, path: Path, facts: dict[str, str], functions: bool, storage: Storage
) -> tuple[str, ...]:
    """Write a graph, its modules as functions if that was asked for; notes on them, and on where its weights are."""
    stored = stream_weights(graph.model, path, storage)
    describe(graph.model, facts | data_facts(graph.model))
    model = graph.model.clone() if functions else graph.model
    notes = as_functions(model) if functions else ()
    write_model(model, path, storage)
    return (*stored.notes(storage.mode), *notes)


def _learned(graph: Graph, found: Graph) -> dict[str, str]:
    """What verification found out about the sizes that a graph is right for, if that is news to its file."""
    before = dim_facts(graph.traced.dims, graph.traced.conditions)
    learned = dim_facts(found.traced.dims, found.traced.conditions)
    return learned if learned != before else {}


def _build(
    request: Request | None, document: ExportDocument, folder: Path, console: Console
) -> list[EngineEntry]:
    """Build the engines of every graph of a report, and write them into it."""
    built: list[EngineEntry] = []
    for entry in document["graphs"] if request is not None else ():
        assert request is not None
        entry["engines"] = build_files(request, folder / entry["file"], folder, console.step)
        built += entry["engines"]
    return built


def _verified(graph: Graph, path: Path, request: ExportRequest) -> Verified:
    """The graph with what verification learned of its dimensions; without a report if it is not verified."""
    parts = Parts(request.compare, request.storage)
    if parts.wanted(graph, path):
        if not request.verify:
            return parts.unverified(graph)
        return parts.verified(graph, path, request.tolerance, request.seed)
    with filled_weights(graph):
        return _verified_whole(graph, path, request)


def _verified_whole(graph: Graph, path: Path, request: ExportRequest) -> Verified:
    provider = request.provider
    try:
        if not request.verify:
            runner_of(path, provider, graph.dtype)  # it must load, whatever it computes
            return Verified(graph, None)
        comparison = request.comparison
        if graph.kind != "model":
            comparison = replace(comparison, files=(), at=())  # those are the model's
        report, dims = verify_graph(
            graph,
            path,
            tolerance=request.tolerance,
            seed=request.seed,
            provider=provider,
            settings=comparison,
        )
        return Verified(replace(graph, traced=replace(graph.traced, dims=dims)), report)
    except UsageError as error:
        kernel = _NO_KERNEL.search(error.what)
        if kernel is None:
            raise NotExportableError(
                f"{path.name} was made, but it cannot be run: {error.what}",
                code=Code.INVALID_GRAPH,
                hint="this is a defect of the exporter; run with --debug and report it",
            ) from error
        if not request.verify:
            note = f"onnxruntime on {provider} cannot run it: it has no {kernel['op']} for this dtype"
            return Verified(replace(graph, notes=(*graph.notes, note)), None)
        raise MissingBackendError(
            f"{path.name} cannot be verified: onnxruntime on {provider} has no {kernel['op']} for this dtype",
            hint="--no-verify writes it unverified; --backend onnxruntime-cuda may have it, and float32 has",
        ) from error


def _effect(checked: Verified, request: ExportRequest) -> Effect | None:
    """What packing weights did, where any are packed and the graph computes what they say."""
    graph, report = checked.graph, checked.report
    if graph.quantized is None or report is None or report.exit_code:
        return None
    with request.console.step("measuring what packing weights does"):
        if checked.runs:
            return effect_by_runs(graph, checked.runs)
        with filled_weights(graph):
            return effect_of(graph, request.provider, request.seed, request.comparison)


def file_names(stem: str, graphs: tuple[Graph, ...]) -> list[str]:
    """`model.onnx`, and `model.gate.onnx` or, of several gates, `model.gate.0.onnx`, ..."""
    gates = [graph for graph in graphs if graph.kind == "gate"]
    numbered = [f"{stem}.gate.{index}.onnx" for index in range(len(gates))]
    steps = [f"{stem}.step.onnx" for graph in graphs if graph.kind == "step"]
    return [f"{stem}.onnx", *([f"{stem}.gate.onnx"] if len(gates) == 1 else numbered), *steps]


def _for_runtimes(graph: Graph, subject: Subject, folder: Path, name: str) -> list[str]:
    """Write what runtimes of decoders read beside the graph; the names of the files."""
    decoder = graph.reference.module
    text = genai_config(decoder, graph.model.graph, name) if isinstance(decoder, DecoderModule) else None
    if text is None:
        return []
    (folder / GENAI).write_text(text, encoding="utf-8")
    origin = subject.source.parent
    files = list(tokenizer_files(origin)) if is_pretrained(origin) else []
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return [GENAI, *(file.name for file in files)]


def _reject(folder: Path, name: str) -> str:
    """Rename a graph that is not equal to the model, so that nobody deploys it and an older one stays."""
    rejected = f"{name.removesuffix('.onnx')}.rejected.onnx"
    rename_model(folder / name, rejected)
    return rejected


def _check_file(path: Path) -> None:
    model = ir.load(path)
    outside = any(isinstance(value.const_value, ir.ExternalTensor) for value in initializers(model))
    try:
        onnx.checker.check_model(without_weights(model) if outside else str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise NotExportableError(
            f"onnx.checker refuses {path.name}: {error}", code=Code.INVALID_GRAPH
        ) from error


def _print(
    console: Console, folder: Path, graphs: tuple[Graph, ...], names: list[str], reports: list[Report | None]
) -> None:
    for graph, name, report in zip(graphs, names, reports, strict=False):
        console.say(f"\n{folder / name}  ({summary(graph)})")
        for line in site_lines(graph.sites):
            console.say(f"  {line}")
        for note in graph.notes:
            console.say(f"  note: {PLACE.sub(lambda place: os.path.relpath(place[0]), note)}")
        if report is not None and not (console.quiet or console.as_json):
            console.say()
            show_report(report, sys.stdout, verbose=console.verbose)
    if is_only_a_gate(graphs):
        console.say("\nThe model is only a gate: its graph and the gate graph are the same.")
    console.say("\nwritten: " + ", ".join(str(folder / name) for name in names))
    if any(report is not None and report.exit_code for report in reports):
        said = {"unfinished": "NOT FINISHED", "not proven": "NOT PROVEN equal to the model"}
        what = said.get(verdict_of(reports), "NOT EQUAL to the model")
        console.say(f"{what}; the graphs are kept as *.rejected.onnx to look into.")


def site_lines(sites: Sequence[Site]) -> Iterator[str]:
    """A line an einsum; the iterations of a loop are one line with their number."""
    iterations: dict[tuple[str | None, int | None, str, str, str], int] = {}
    for site in sites:
        key = (site.file, site.line, site.module, site.equation, site.became)
        iterations[key] = iterations.get(key, 0) + 1
    for (file, line, module, equation, became), count in iterations.items():
        place = f"{os.path.relpath(Path(file).resolve())}:{line}" if file else "?"
        inside = strip_scope(module, SCOPE)  # "": in the graph of a loop, which has no modules
        where = f"{place} in {inside}" if inside not in ("", SCOPE) else place
        yield f"einsum {equation!r} at {where}: {became}" + (f"  (x {count})" if count > 1 else "")
