"""`moe-export bench graph.onnx --against model.py`: latency and memory over the backends that are there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import onnx

from moe_export.backends import ONNXRUNTIME, OPENVINO
from moe_export.commands.console import Console
from moe_export.export.engines.graph_file import read_graph
from moe_export.export.engines.profiles import Range
from moe_export.export.engines.shape_inputs import complete_profile
from moe_export.options.sizes import parse_one_set
from moe_export.running.benching import Job, Timing, TimingEntry, measure
from moe_export.running.engines import graph_of
from moe_export.running.inputs import inputs_at
from moe_export.verify.cost.graph_cost import Cost, CostEntry, cost_of, parts_of

SCHEMA: Final = "moe-export/bench/1"


class NotCounted(TypedDict):
    """Why a graph's cost is not known."""

    reason: str


class BenchDocument(TypedDict):
    """The measurements of a graph: `moe-export bench --json`."""

    schema: Literal["moe-export/bench/1"]
    graph: str
    sizes: dict[str, int]
    cost: CostEntry | NotCounted
    backends: list[TimingEntry]


_GRAPH = (*ONNXRUNTIME, OPENVINO)


def run_bench(
    graph: str,
    against: str | None,
    sizes: tuple[str, ...],
    repeat: int,
    compiled: bool,
    init: tuple[str, ...],
    inputs: tuple[str, ...],
    console: Console,
) -> int:
    """Run the command; the exit code: 0, whatever was found."""
    path = Path(graph)
    model, _ = read_graph(path)
    chosen = complete_profile(
        model, {name: Range(size, size, size) for name, size in parse_one_set(sizes).items()}
    )
    arrays = inputs_at(model, {name: found.best for name, found in chosen.items()})
    with console.step("counting FLOPs and bytes"):
        cost, reason = _cost(path, arrays)
    common: dict[str, Any] = {"inputs": arrays, "repeat": repeat}
    if cost is not None:
        common |= {"flops": cost.total.flops, "bytes_moved": cost.bytes_moved}
    dtype = model.metadata_props.get("moe_export.dtype", "float32")
    jobs = [Job(backend, str(path), dtype=dtype, **common) for backend in _GRAPH]
    engines = sorted(path.parent.glob("*.engine"))
    jobs += [Job("engine", str(found), **common) for found in engines if graph_of(found) == path]
    if against is not None:
        kinds = ["torch", "torch-cuda"]
        kinds += ["torch.compile", "torch.compile-cuda"] if compiled else []
        jobs = [Job(kind, against, init=init, shapes=inputs, **common) for kind in kinds] + jobs
    timings = []
    for job in jobs:
        with console.step(f"measuring {Path(job.path).name if job.backend == 'engine' else job.backend}"):
            timings.append(measure(job))
    document: BenchDocument = {
        "schema": SCHEMA,
        "graph": path.name,
        "sizes": {name: found.best for name, found in chosen.items()},
        "cost": cost.to_dict() if cost is not None else {"reason": reason},
        "backends": [timing.to_dict() for timing in timings],
    }
    console.json(json.dumps(document, indent=2))
    if not (console.quiet or console.as_json):
        _show(document["sizes"], timings, path)
        _show_cost(cost, reason)
    return 0


def _cost(path: Path, arrays: dict[str, Any]) -> tuple[Cost | None, str]:
    """What the graph costs; or why that is not known."""
    try:
        proto = onnx.load(path)
        return cost_of(proto, arrays, parts_of(proto)), ""
    except Exception as error:  # whatever ONNX Runtime says of the graph
        return None, str(error).strip().splitlines()[0]


def _show(sizes: Any, timings: list[Timing], path: Path) -> None:
    from rich.console import Console as Rich
    from rich.table import Table

    at = " ".join(f"{name}={size}" for name, size in sizes.items())
    table = Table(title=f"{path} at {at or 'its size'}", title_justify="left", box=None, pad_edge=False)
    for heading in ("backend", "median ms", "p10", "p90", "calls/s", "memory MB", "% of roofline"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for timing in timings:
        if not timing.reason:
            found = timing.to_dict()
            cells = [f"{found[key]:.3g}" for key in ("median_ms", "p10_ms", "p90_ms", "calls_per_second")]
            share = f"{timing.bound / found['median_ms']:.0%}" if timing.bound else "-"
            table.add_row(timing.name, *cells, f"{timing.memory / 1e6:.0f}", share)
    rich = Rich(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    rich.print(table)
    for timing in timings:
        if timing.note:
            rich.print(f"{timing.name} {timing.note}", markup=False, highlight=False)
        if timing.reason:
            rich.print(f"not run: {timing.name}: {timing.reason}", markup=False, highlight=False)


def _show_cost(cost: Cost | None, reason: str) -> None:
    from rich.console import Console as Rich
    from rich.table import Table

    rich = Rich(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    if cost is None:
        rich.print(f"FLOPs and bytes are not known: {reason}", markup=False, highlight=False)
        return
    table = Table(title="\nwhat one run costs", title_justify="left", box=None, pad_edge=False)
    for heading in ("part", "nodes", "MFLOP", "weights MB", "activations MB", "time"):
        table.add_column(heading, justify="left" if heading == "part" else "right", no_wrap=True)
    whole = cost.total
    for name, work in [("all", whole), *cost.blocks.items()]:
        share = work.milliseconds / whole.milliseconds if whole.milliseconds else 0.0
        sizes = (work.flops, work.weight_bytes, work.activation_bytes)
        table.add_row(name, str(work.nodes), *(f"{size / 1e6:.3g}" for size in sizes), f"{share:.0%}")
    rich.print(table)
    if cost.uncounted:
        rich.print(f"FLOPs not counted: {', '.join(cost.uncounted)}", markup=False, highlight=False)
