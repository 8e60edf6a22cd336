"""`moe-export build model.onnx --engine sm89`, and the engines that an export makes: all files or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import click

import moe_export
from moe_export.commands.console import Console
from moe_export.errors import UsageError
from moe_export.export.engines.build import Engine, EngineFacts, build_engines
from moe_export.export.engines.graph_file import read_graph
from moe_export.export.engines.module import check_capabilities, load_module
from moe_export.export.engines.profiles import Range, parse_range
from moe_export.export.engines.settings import Settings, check_settings
from moe_export.export.engines.shape_inputs import range_names
from moe_export.export.onnx.serialize import staging
from moe_export.options.engines import ENGINES
from moe_export.options.memory import parse_bytes
from moe_export.options.table import names_in
from moe_export.own_files import require_free
from moe_export.running.engines import NOT_RUN, not_run, run_status
from moe_export.verify.reports.report import ReportDocument

SCHEMA: Final = "moe-export/engines/1"


class EngineEntry(EngineFacts):
    """An engine's file, and whether it ran and is right."""

    file: str
    status: str
    verification: ReportDocument | None


class EnginesDocument(TypedDict):
    """What `moe-export build` made: `MODEL.engines.json`."""

    schema: Literal["moe-export/engines/1"]
    version: str
    source: str
    engines: list[EngineEntry]


@dataclass(frozen=True)
class Request:
    """The engines that the user asks for.

    Attributes:
        capabilities: What to build for, in lower case.
        profiles: Ranges of dimensions, and of values that decide shapes, one dict a profile.
        module: `tensorrt-rtx`, `tensorrt`, or None for whichever fits.
        settings: The rest.
        layers: Whether to write what each engine is made of.
        require: Whether engines that cannot be run here are an error.
    """

    capabilities: tuple[str, ...]
    profiles: tuple[Mapping[str, Range], ...]
    module: str | None
    settings: Settings
    layers: bool
    require: bool


def take_request(options: dict[str, Any]) -> Request | None:
    """Take the options of engines out of a command's options, and check what can be checked without a graph.

    Returns:
        None if no engine is asked for.

    Raises:
        UsageError: A range or an amount that cannot be read.
        MissingBackendError: TensorRT is not installed.
    """
    given = {name: options.pop(name) for name in names_in(ENGINES)}
    engine = given.pop("engine")
    if engine is None:
        return None
    wanted = [name.strip().lower() for name in engine.split(",")]
    profiles = [dict(map(parse_range, _parts(text))) for text in given["ranges"]]
    settings = Settings(
        strip_weights=given["strip_weights"],
        refit=given["refit"],
        workspace=None if given["workspace"] is None else parse_bytes(given["workspace"], "--workspace"),
        tf32=given["tf32"],
        timing_cache=Path(given["timing_cache"]) if given["timing_cache"] else None,
        version_compatible=given["version_compatible"],
        platform=given["platform"],
    )
    module = load_module(given["builder"], wanted)
    capabilities = check_capabilities(wanted, module)
    check_settings(settings, module)
    return Request(
        capabilities,
        tuple(profiles or [{}]),
        module.name,
        settings,
        given["layers"],
        given["require_run"],
    )


def _parts(text: str) -> list[str]:
    return [part for part in text.split(",") if part.strip()]


def check_names(request: Request, known: Iterable[str]) -> None:
    """Refuse a range of a dimension that no graph has.

    Raises:
        UsageError: It lists the dimensions that there are.
    """
    names = list(dict.fromkeys(known))
    for profile in request.profiles:
        for name in profile:
            if name not in names:
                raise UsageError(
                    f"--range {name}: no dynamic dimension {name!r}",
                    hint=f"there are: {', '.join(names)}" if names else "every size is fixed",
                )


def build_files(
    request: Request, graph: Path, folder: Path, step: Callable[[str], AbstractContextManager[Any]]
) -> list[EngineEntry]:
    """Build the engines of a graph into a folder: `model.sm89.engine`, and `model.sm89.layers.json` if asked for.

    Ranges of dimensions that this graph does not have are left out: a gate may have fewer than its model.

    Returns:
        What a report says of each, with its file's name.
    """
    model, _ = read_graph(graph)
    names = set(range_names(model))
    ranges = [{name: found for name, found in one.items() if name in names} for one in request.profiles]
    engines = build_engines(
        graph, request.capabilities, ranges, module=request.module, settings=request.settings, step=step
    )
    return [_write(engine, graph, folder, request.layers) for engine in engines]


def _write(engine: Engine, graph: Path, folder: Path, layers: bool) -> EngineEntry:
    name = f"{graph.name.removesuffix('.onnx')}.{engine.capability}"
    (folder / f"{name}.engine").write_bytes(engine.plan)
    if layers:
        text = json.dumps(engine.layers, indent=1)
        (folder / f"{name}.layers.json").write_text(text + "\n", encoding="utf-8")
    path = folder / f"{name}.engine"
    if "platform" in engine.settings:
        status, report = f"{NOT_RUN}: it is for {engine.settings['platform']}", None
    else:
        status, report = run_status(path, graph, engine.capability, engine.module)
    verification = report.to_dict() if report is not None else None
    return {"file": f"{name}.engine", "status": status, **engine.to_dict(), "verification": verification}


def exit_code(request: Request, engines: Iterable[EngineEntry], console: Console) -> int:
    """1 if an engine ran and is not equal, 4 if one had to run and did not, else 0; says so."""
    statuses = [str(found["status"]) for found in engines]
    if "not equal" in statuses:
        console.say("NOT EQUAL to the graph that it was built from")
        return 1
    error = not_run(statuses) if request.require else None
    if error is not None:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    return 0


def engine_lines(documents: Iterable[EngineEntry], folder: Path) -> list[str]:
    """A line an engine, for people."""
    lines = []
    for found in documents:
        size = f"{found['size'] / 1e6:.1f} MB, {found['seconds']:.1f} s"
        lines.append(
            f"{folder / found['file']}  ({found['module']} {found['version']}, {size}; {found['status']})"
        )
        for profile in found["profiles"]:
            sizes = ", ".join(f"{name} {low}:{best}:{high}" for name, (low, best, high) in profile.items())
            lines.append(f"  profile: {sizes or 'no dynamic size'}")
        lines += [f"  note: {note}" for note in found["notes"]]
    return lines


def run_build(
    graph: str,
    output: str | None,
    console: Console,
    force: bool = False,
    **options: Any,
) -> int:
    """Run the command; the exit code."""
    request = take_request(options)
    assert request is not None  # --engine is required here
    path = Path(graph)
    model, _ = read_graph(path)
    check_names(request, range_names(model))
    folder = Path(output) if output is not None else path.parent
    name = f"{path.name.removesuffix('.onnx')}.engines.json"
    require_free(folder / name, "report", inputs=[path], force=force)
    cache = request.settings.timing_cache
    if cache is not None and cache.exists() and cache.samefile(path):
        raise UsageError(f"{cache} is the graph, and no cache of timings", hint="--timing-cache timings.bin")
    with staging(folder.absolute(), inputs=[path], force=force) as temporary:
        engines = build_files(request, path, temporary, console.step)
        document: EnginesDocument = {
            "schema": SCHEMA,
            "version": moe_export.__version__,
            "source": path.name,
            "engines": engines,
        }
        text = json.dumps(document, indent=2)
        (temporary / name).write_text(text + "\n", encoding="utf-8")
    console.json(text)
    for line in engine_lines(engines, folder):
        console.say(line)
    console.say(f"report: {folder / name}")
    return exit_code(request, engines, console)
