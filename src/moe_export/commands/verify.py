"""`moe-export verify A --against B`: the check alone, for any two artifacts; PyTorch only for a model file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.commands.console import Console
from moe_export.commands.reports import Wanted, write_reports
from moe_export.commands.sizes import parse_bytes
from moe_export.comparing.artifacts import Artifact, parse_artifact
from moe_export.comparison_settings import check_names, parse_settings, parse_tolerance
from moe_export.errors import UsageError
from moe_export.export.onnx.serialize import staging
from moe_export.own_files import put, require_free
from moe_export.verify import Report, show
from moe_export.verify.golden import Golden, Recorder, save_golden
from moe_export.verify.reports.report import worst_code

if TYPE_CHECKING:
    from moe_export.comparing.verifying import Request

REPRO = {
    "run.py": "text",
    "model.onnx": "graph",
    "inputs.npz": "arrays",
    "expected.npz": "arrays",
    "model.errors.onnx": "graph",
    "model.errors.json": "report",
}
"""What `--repro` may write, and what each is (see `own_files`)."""
SEVERAL = "moe-export/verify-reports/1"


def run_verify(
    graph: str,
    against: tuple[str, ...],
    init: tuple[str, ...],
    inputs: tuple[str, ...],
    rtol: float | None,
    atol: float | None,
    seed: int,
    provider: str,
    quiet: bool,
    as_json: bool,
    debug: bool,
    backend: str | None = None,
    record: str | None = None,
    tolerances: tuple[str, ...] = (),
    wanted: Wanted | None = None,
    localise: bool = True,
    repro: str | None = None,
    inside: bool = False,
    memory: str = "1GiB",
    how: str | None = None,
    dtype: str = "float32",
    gate: str | None = None,
    **settings: Any,
) -> int:
    """Run the command; the exit code, the worst of several."""
    from moe_export.comparing.verifying import Request

    console = Console(quiet, as_json)
    candidate = parse_artifact(graph, backend, provider)
    references = [parse_artifact(text, None, provider) for text in against]
    if not references and record is None:
        raise UsageError("Missing option '--against'", hint="or --record golden.safetensors, to store a run")
    request = Request(
        tolerance=parse_tolerance(rtol, atol, tolerances),
        seed=seed,
        settings=parse_settings(**settings),
        init=init,
        inputs=inputs,
        recorder=None if record is None else Recorder(),
        why=[] if localise or inside or repro is not None else None,
        inside=inside,
        memory=parse_bytes(memory, "--memory"),
        how=how,
        dtype=dtype,
        gate=gate,
    )
    wanted = wanted or Wanted()
    read = [artifact.file for artifact in (candidate, *references)] + list(request.settings.files)
    wanted.require_free(read)
    if record is not None:
        require_free(Path(record), "tensors", inputs=read, force=wanted.force)
    if repro is not None:
        for name, kind in REPRO.items():
            require_free(Path(repro) / name, kind, inputs=read, force=wanted.force)
    if not references:
        return _record_alone(candidate, request, Path(record or ""), console, wanted.force)
    with console.user_code():
        reports = [_compared(candidate, reference, request, console) for reference in references]
    again = _again(graph, request, backend)
    reports = [replace(report, about={**report.about, "command": again}) for report in reports]
    for report in reports:
        check_names(request.tolerance, [row.output for row in report.rows])
    if record is not None and request.recorder is not None:
        recorder = request.recorder
        golden = Golden(recorder.engine, tuple(recorder.kept), recorder.routing, reports[0].about)
        _save(golden, Path(record), console, wanted.force)
    console.json(json.dumps(_document(reports, request), indent=2))
    for report in reports:
        if not (quiet or as_json):
            show(report, sys.stdout)
    for why in request.why or ():
        console.say(f"\n{why}")
        if repro is not None:
            with staging(Path(repro).absolute(), inputs=read, force=wanted.force) as temporary:
                names = [file.name for file in why.write(temporary)]
            console.say("written: " + ", ".join(str(Path(repro) / name) for name in names))
    write_reports(reports, wanted, console, read)
    return worst_code(reports) or int(bool(request.inside and request.why))


def _compared(candidate: Artifact, reference: Artifact, request: Request, console: Console) -> Report:
    from moe_export.comparing.verifying import compare_artifacts

    with console.step(f"verifying {candidate.text} against {reference.text}"):
        return compare_artifacts(candidate, reference, request)


def _document(reports: list[Report], request: Request) -> dict[str, Any]:
    if len(reports) == 1:
        document = reports[0].to_dict()
        return {**document, "why": request.why[0].to_dict()} if request.why else document
    return {"schema": SEVERAL, "reports": [report.to_dict() for report in reports]}


def _again(graph: str, request: Request, backend: str | None) -> str:
    """The command that runs one case of the report again, but for `--against` and the case."""
    words = ["moe-export verify", graph]
    words += [f"--backend {backend}"] if backend else []
    words += [f"--init {text}" for text in request.init] + [f"--input {text}" for text in request.inputs]
    words += [f"--inputs {file}" for file in request.settings.files]
    words += [f"--dtype {request.dtype}"] if request.dtype != "float32" else []
    words += [f"--gate {request.gate}"] if request.gate is not None else []
    words += ["--thorough"] if request.settings.thorough else []
    return " ".join(words)


def _record_alone(artifact: Artifact, request: Request, path: Path, console: Console, force: bool) -> int:
    """Store what one artifact computes, without comparing it."""
    if artifact.kind != "model":
        raise UsageError(
            "only a model file can be recorded alone",
            hint=f"moe-export verify {artifact.text} --against model.py --record {path}",
        )
    from moe_export.comparing.verifying_models import record_model

    assert request.recorder is not None
    with console.user_code(), console.step(f"running {artifact.text}"):
        routing = record_model(artifact, request)
    recorder = request.recorder
    _save(
        Golden(recorder.engine, tuple(recorder.kept), routing, {"reference": artifact.text}),
        path,
        console,
        force,
    )
    return 0


def _save(golden: Golden, path: Path, console: Console, force: bool) -> None:
    """Store what the reference computed; only cases that it took. What the command reads was looked at before."""
    put(path, partial(save_golden, golden), force=force)
    console.say(f"recorded: {path}, {len(golden.cases)} cases of {golden.engine}")
