"""`moe-export bench graph.onnx --against model.py`: latency and memory over the backends that are there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir

from moe_export.benching import Job, Timing, measure
from moe_export.console import Console
from moe_export.engine_running import example_input, graph_of
from moe_export.export.engine import read_graph
from moe_export.export.engine_profiles import complete_ranges, free_dims, input_shapes, parse_range, shapes_at
from moe_export.verify import TensorSpec

SCHEMA = "moe-export/bench/1"
_ORT = ("onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt")


def run_bench(
    graph: str,
    against: str | None,
    sizes: tuple[str, ...],
    repeat: int,
    compiled: bool,
    init: tuple[str, ...],
    inputs: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> int:
    """Run the command; the exit code: 0, whatever was found."""
    console = Console(quiet, as_json)
    path = Path(graph)
    model, _ = read_graph(path)
    chosen = complete_ranges(free_dims(model), dict(map(parse_range, sizes)))
    arrays = _inputs(model, {name: found.best for name, found in chosen.items()})
    common: dict[str, Any] = {"inputs": arrays, "repeat": repeat}
    dtype = model.metadata_props.get("moe_export.dtype", "float32")
    jobs = [Job(backend, str(path), dtype=dtype, **common) for backend in _ORT]
    engines = sorted(path.parent.glob("*.engine"))
    jobs += [Job("engine", str(found), **common) for found in engines if graph_of(found) == path]
    if against is not None:
        kinds = ["torch", "torch.compile"] if compiled else ["torch"]
        jobs = [Job(kind, against, init=init, shapes=inputs, **common) for kind in kinds] + jobs
    timings = []
    for job in jobs:
        with console.step(f"measuring {Path(job.path).name if job.backend == 'engine' else job.backend}"):
            timings.append(measure(job))
    document = {
        "schema": SCHEMA,
        "graph": path.name,
        "sizes": {name: found.best for name, found in chosen.items()},
        "backends": [timing.to_dict() for timing in timings],
    }
    console.json(json.dumps(document, indent=2))
    if not (quiet or as_json):
        _show(document["sizes"], timings, path)
    return 0


def _inputs(model: ir.Model, sizes: dict[str, int]) -> dict[str, Any]:
    shapes = shapes_at(
        input_shapes(model), complete_ranges(free_dims(model), {n: (s, s, s) for n, s in sizes.items()})
    )
    dtypes = {str(value.name): value.dtype for value in model.graph.inputs}
    return {
        name: example_input(TensorSpec(name, (dtypes[name] or ir.DataType.FLOAT).numpy().name, best), {})
        for name, (_, best, _) in shapes.items()
    }


def _show(sizes: Any, timings: list[Timing], path: Path) -> None:
    from rich.console import Console as Rich
    from rich.table import Table

    at = " ".join(f"{name}={size}" for name, size in sizes.items())
    table = Table(title=f"{path} at {at or 'its size'}", title_justify="left", box=None, pad_edge=False)
    for heading in ("backend", "median ms", "p10", "p90", "calls/s", "memory MB"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for timing in timings:
        if not timing.reason:
            found = timing.to_dict()
            cells = [f"{found[key]:.3g}" for key in ("median_ms", "p10_ms", "p90_ms", "calls_per_second")]
            table.add_row(timing.name, *cells, f"{timing.memory / 1e6:.0f}")
    rich = Rich(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    rich.print(table)
    for timing in timings:
        if timing.reason:
            rich.print(f"not run: {timing.name}: {timing.reason}", markup=False, highlight=False)
