"""Run built engines: against the graph that they were built from, or wherever a graph is compared with a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_export.errors import MissingBackendError
from moe_export.export.engines.build import read_graph
from moe_export.export.engines.module import CURRENT, FULL, PORTABLE, RTX, load_module
from moe_export.export.engines.profiles import input_shapes
from moe_export.verify import (
    DimRange,
    OnnxRuntimeRunner,
    Report,
    TensorRtRunner,
    TensorSpec,
    Tolerance,
    cases,
    compare,
)
from moe_export.verify.runners.engine_header import LENGTH, EngineHeader, read_header
from moe_export.verify.runners.tensorrt_runner import present_gpu
from moe_export.verify.specs import Array, numpy_dtype

NO_GPU = "built, not run: no GPU"
_ENGINE = re.compile(r"(?P<stem>.+?)(\.(sm\d+|portable|current))?\.engine")


def graph_of(engine: Path) -> Path | None:
    """The graph that an engine was built from: `model.onnx` beside `model.sm89.engine`, if it is there."""
    match = _ENGINE.fullmatch(engine.name)
    graph = engine.with_name(f"{match['stem']}.onnx") if match else None
    return graph if graph is not None and graph.is_file() else None


def open_engine(path: Path, module: str | None = None) -> TensorRtRunner:
    """An engine, ready to run; its free axes have the names of the graph beside it.

    Raises:
        UsageError: It is no engine, of another version, or for other GPUs.
        MissingBackendError: No TensorRT, or no GPU.
    """
    if module is None:
        module = FULL if path.is_file() and header_of(path) is None else RTX
    graph = graph_of(path)
    shapes = input_shapes(read_graph(graph)[0]) if graph is not None else None
    return TensorRtRunner(path, load_module(module), shapes=shapes)


def header_of(engine: Path) -> EngineHeader | None:
    """What the first bytes of an engine say of it; None of one that TensorRT-RTX did not build."""
    with engine.open("rb") as file:
        return read_header(file.read(LENGTH))


def run_status(engine: Path, graph: Path, capability: str, module: str) -> tuple[str, Report | None]:
    """Run an engine beside the graph that it was built from, on onnxruntime's CPU.

    Returns:
        What happened, in words, and the report if it ran: `built, not run: no GPU` on a machine without one.
    """
    here = present_gpu()
    if here is None:
        return NO_GPU, None
    if capability not in {here, CURRENT, PORTABLE}:
        return f"built, not run: this GPU is {here}", None
    candidate = TensorRtRunner(engine, load_module(module), shapes=input_shapes(read_graph(graph)[0]))
    report = compare_with_graph(candidate, graph)
    return report.verdict, report


def compare_with_graph(candidate: TensorRtRunner, graph: Path, seed: int = 0) -> Report:
    """Compare an engine with its graph at the sizes of its profile."""
    reference = OnnxRuntimeRunner(graph)
    sizes = {dim.name: dim.traced for dim in candidate.dims}
    ranges = [DimRange(dim.name, dim.traced, dim.minimum, dim.maximum) for dim in candidate.dims]
    example = {spec.name: example_input(spec, sizes) for spec in candidate.inputs}
    return compare(
        reference,
        candidate,
        cases(list(candidate.inputs), ranges, example, seed),
        tolerance=Tolerance(None, None),
        routing=[],
    )


def example_input(spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """Seeded normal floats of a size, or zeros: an id of 0 is in every table."""
    shape: list[Any] = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    dtype = numpy_dtype(spec.dtype)
    if spec.dtype.startswith(("float", "bfloat")):
        return np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype)


def not_run(statuses: list[str]) -> MissingBackendError | None:
    """The error of `--require-run` for engines that were not run; None if all were."""
    missing = [status for status in statuses if status.startswith("built, not run")]
    if not missing:
        return None
    return MissingBackendError(
        f"{missing[0]} (--require-run)",
        hint="they are written; where their GPU is: moe-export verify model.sm89.engine --against model.py",
    )
