"""`moe-export verify A --against B`: the check alone, for any two artifacts; PyTorch only for a model file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from moe_export.commands.console import Console
from moe_export.commands.reports import Wanted, take_wanted, write_reports
from moe_export.comparing.artifacts import Artifact, parse_artifact, parse_candidates
from moe_export.comparison_settings import SETTINGS, check_names, parse_settings, parse_tolerance
from moe_export.errors import MoeExportError, UsageError
from moe_export.export.onnx.serialize import staging
from moe_export.options.memory import parse_bytes
from moe_export.options.table import options_of
from moe_export.own_files import put, require_free
from moe_export.reports.reproduce import reproduce_command
from moe_export.verify import Report, RoutingPair, show
from moe_export.verify.golden import Golden, Recorder, save_golden
from moe_export.verify.reports.beside import beside
from moe_export.verify.reports.report import worst_code

if TYPE_CHECKING:
    from moe_export.commands.verify_document import SeveralDocument, VerifyDocument
    from moe_export.comparing.explaining import Explanation
    from moe_export.comparing.request import Request

REPRO = {
    "run.py": "text",
    "model.onnx": "graph",
    "inputs.npz": "arrays",
    "expected.npz": "arrays",
    "model.errors.onnx": "graph",
    "model.errors.json": "report",
}
"""What `--repro` may write, and what each is (see `own_files`)."""
_MORE_CASES = {"thorough", "sizes", "input_files", "seeds"}


@dataclass(frozen=True, eq=False)
class VerifyRequest:
    """What `verify` was asked for, read and checked before anything is loaded.

    Attributes:
        candidates: What is judged: one artifact, on each of its backends.
        references: What is right; none where outputs are only recorded.
        request: How they are compared.
        wanted: Which reports are written.
        record: Where inputs and right outputs are stored.
        repro: The folder of a script that shows a fault.
        command: The command that reproduces it.
        console: How much is printed.
    """

    candidates: tuple[Artifact, ...]
    references: tuple[Artifact, ...]
    request: Request
    wanted: Wanted
    record: Path | None
    repro: Path | None
    command: str
    console: Console

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> VerifyRequest:
        """The request that a command line is.

        Args:
            given: The command's options by their names in Python.

        Raises:
            UsageError: One of them cannot be read, or a file that it would write is in the way.
        """
        from moe_export.comparing.request import Request

        record, repro = given["record"], given["repro"]
        if not given["against"] and record is None:
            raise UsageError(
                "Missing option '--against'", hint="or --record golden.safetensors, to store a run"
            )
        explained = given["localise"] or given["inside"] or repro is not None
        asked = cls(
            candidates=parse_candidates(given["graph"], given["backend"]),
            references=tuple(parse_artifact(text) for text in given["against"]),
            request=Request(
                tolerance=parse_tolerance(given["rtol"], given["atol"], given["tolerances"]),
                settings=parse_settings(**{name: given[name] for name in SETTINGS}),
                recorder=None if record is None else Recorder(),
                why=[] if explained else None,
                memory=parse_bytes(given["memory"], "--memory"),
                how=given["compare"],
                **{name: given[name] for name in ("seed", "init", "inputs", "inside", "dtype", "gate")},
            ),
            wanted=take_wanted(dict(given)),
            record=None if record is None else Path(record),
            repro=None if repro is None else Path(repro),
            command=reproduce_command(given["graph"], given),
            console=given["console"],
        )
        asked.check_stored(given)
        asked.require_free()
        return asked

    @property
    def read(self) -> list[Path]:
        """The files that it reads."""
        return [artifact.file for artifact in (*self.candidates, *self.references)] + list(
            self.request.settings.files
        )

    def check_stored(self, given: Mapping[str, Any]) -> None:
        """Refuse an option that asks for cases where they are stored: it would have no effect.

        Raises:
            UsageError: There is one.
        """
        golden = [each for each in (*self.candidates, *self.references) if each.kind == "golden"]
        for option in options_of("verify") if golden else ():
            if option.name in _MORE_CASES and given[option.name] != option.unset:
                raise UsageError(
                    f"{option.word} has no effect: the cases are those of {golden[0].text}",
                    hint="record a golden file with it: moe-export verify model.py --record golden.safetensors",
                )

    def require_free(self) -> None:
        """Refuse to overwrite what is not ours.

        Raises:
            UsageError: A file is in the way.
        """
        force = self.wanted.force
        self.wanted.require_free(self.read)
        if self.record is not None:
            require_free(self.record, "tensors", inputs=self.read, force=force)
        for name, kind in REPRO.items() if self.repro is not None else ():
            assert self.repro is not None
            require_free(self.repro / name, kind, inputs=self.read, force=force)


def run_verify(asked: VerifyRequest) -> int:
    """Run the command; the exit code, the worst of several."""
    console, request = asked.console, asked.request
    if not asked.references:
        return _record_alone(asked, console)
    with console.user_code():
        reports, missing = _all_compared(asked)
    reports = [replace(report, about={**report.about, "command": asked.command}) for report in reports]
    for report in reports:
        check_names(request.tolerance, [row.output for row in report.rows])
    if request.recorder is not None:
        _save(request.recorder, request.recorder.routing, reports[0].about, asked, console)
    console.json(json.dumps(_document(reports, request, missing), indent=2))
    if not (console.quiet or console.as_json):
        _show(reports, missing, asked)
    for why in request.why or ():
        console.say(f"\n{why}")
        if asked.repro is not None:
            _write_repro(why, asked.repro, asked, console)
    write_reports(reports, asked.wanted, console, asked.read)
    failed = max((error.exit_code for _, error in missing), default=0)
    return worst_code(reports) or failed or int(bool(request.inside and request.why))


Missing: TypeAlias = "list[tuple[str, MoeExportError]]"
"""Backends that could not run the graph, each with its error."""


def _all_compared(asked: VerifyRequest) -> tuple[list[Report], Missing]:
    """Each candidate with each reference; of several candidates, one that cannot be run does not end the others.

    Raises:
        MoeExportError: The only candidate cannot be run, or none can.
    """
    reports: list[Report] = []
    missing: Missing = []
    request = asked.request
    for candidate in asked.candidates:
        try:
            found = [_compared(candidate, each, request, asked.console) for each in asked.references]
        except MoeExportError as error:
            missing.append((candidate.backend or candidate.text, error))
            continue
        reports += found
        request = replace(request, recorder=None)  # the reference's values are the same for all
    if not reports:
        raise missing[0][1]
    return reports, missing


def _show(reports: list[Report], missing: Missing, asked: VerifyRequest) -> None:
    """Each report; of several backends one table before them, and in full only those that are not equal."""
    console = asked.console
    if len(asked.candidates) == 1:
        for report in reports:
            show(report, sys.stdout, verbose=console.verbose)
        return
    refused = [(name, str(error)) for name, error in missing]
    for reference in dict.fromkeys(report.reference for report in reports):
        against = [report for report in reports if report.reference == reference]
        print(f"against {reference}\n\n{beside(against, refused)}\n")
    for report in reports:
        if console.verbose or report.verdict != "equal":
            show(report, sys.stdout, verbose=console.verbose)


def _write_repro(why: Explanation, folder: Path, asked: VerifyRequest, console: Console) -> None:
    with staging(folder.absolute(), inputs=asked.read, force=asked.wanted.force) as temporary:
        names = [file.name for file in why.write(temporary)]
    console.say("written: " + ", ".join(str(folder / name) for name in names))


def _compared(candidate: Artifact, reference: Artifact, request: Request, console: Console) -> Report:
    from moe_export.comparing.verifying import compare_artifacts

    with console.step(f"verifying {candidate.text} against {reference.text}"):
        return compare_artifacts(candidate, reference, request)


def _document(reports: list[Report], request: Request, missing: Missing) -> VerifyDocument | SeveralDocument:
    if len(reports) == 1 and not missing:
        document = cast("VerifyDocument", reports[0].to_dict())
        if request.why:
            document["why"] = request.why[0].to_dict()
        return document
    several: SeveralDocument = {
        "schema": "moe-export/verify-reports/1",
        "reports": [report.to_dict() for report in reports],
    }
    if missing:
        several["not_run"] = [{"candidate": name, "reason": str(error)} for name, error in missing]
    return several


def _record_alone(asked: VerifyRequest, console: Console) -> int:
    """Store what one artifact computes, without comparing it."""
    artifact = asked.candidates[0]
    if artifact.kind != "model":
        raise UsageError(
            "only a model file can be recorded alone",
            hint=f"moe-export verify {artifact.text} --against model.py --record {asked.record}",
        )
    from moe_export.comparing.verifying_models import record_model

    assert asked.request.recorder is not None
    with console.user_code(), console.step(f"running {artifact.text}"):
        routing = record_model(artifact, asked.request)
    _save(asked.request.recorder, routing, {"reference": artifact.text}, asked, console)
    return 0


def _save(
    recorder: Recorder,
    routing: Sequence[RoutingPair],
    about: Mapping[str, str],
    asked: VerifyRequest,
    console: Console,
) -> None:
    """Store what the reference computed; only cases that it took. What the command reads was looked at before."""
    assert asked.record is not None
    golden = Golden(recorder.engine, tuple(recorder.recorded), tuple(routing), dict(about))
    put(asked.record, partial(save_golden, golden), force=asked.wanted.force)
    console.say(f"recorded: {asked.record}, {len(golden.cases)} cases of {golden.engine}")
