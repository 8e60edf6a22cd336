"""Run built engines: to compare them with the graph they were built from, or in place of a graph in any comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_export.errors import MissingBackendError
from moe_export.export.engines.graph_file import as_built, read_graph
from moe_export.export.engines.module import CURRENT, FULL, PORTABLE, RTX, load_module
from moe_export.export.engines.profiles import input_shapes
from moe_export.tensorrt_api import present_gpu
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
from moe_export.verify.inputs.known import Known
from moe_export.verify.inputs.meaning import Meaning
from moe_export.verify.runners.engine_header import LENGTH, EngineHeader, read_header
from moe_export.verify.specs import Array, numpy_dtype

NOT_RUN = "built, not run"
NO_GPU = f"{NOT_RUN}: no GPU"
_ENGINE = re.compile(r"(?P<stem>.+?)(\.(?P<capability>sm\d+|portable|current))?\.engine")


def graph_of(engine: Path) -> Path | None:
    """The graph that an engine was built from: `model.onnx` beside `model.sm89.engine`, if it is there."""
    match = _ENGINE.fullmatch(engine.name)
    graph = engine.with_name(f"{match['stem']}.onnx") if match else None
    return graph if graph is not None and graph.is_file() else None


def open_engine(path: Path, module: str | None = None) -> TensorRtRunner:
    """An engine, ready to run; its free axes get their names from the graph beside it, if there is one.

    Args:
        path: The engine's file.
        module: `tensorrt` or `tensorrt-rtx`; None to decide by the file's header.

    Raises:
        UsageError: The file is no engine, or one of another version or for other GPUs.
        MissingBackendError: TensorRT is not installed, or there is no GPU.
    """
    if module is None:
        module = FULL if path.is_file() and header_of(path) is None else RTX
    return _runner(path, graph_of(path), module)


def _runner(engine: Path, graph: Path | None, module: str) -> TensorRtRunner:
    """An engine with the names of its graph, and its weights if they were left out."""
    if graph is None:
        return TensorRtRunner(engine, load_module(module))
    match = _ENGINE.fullmatch(engine.name)
    capability = (match["capability"] if match else None) or CURRENT
    return TensorRtRunner(
        engine,
        load_module(module),
        shapes=input_shapes(read_graph(graph)[0]),
        weights=partial(as_built, graph, capability, module),
    )


def header_of(engine: Path) -> EngineHeader | None:
    """The header of an engine's file; None if TensorRT-RTX did not build it."""
    with engine.open("rb") as file:
        return read_header(file.read(LENGTH))


def run_status(engine: Path, graph: Path, capability: str, module: str) -> tuple[str, Report | None]:
    """Compare an engine with the graph that it was built from, which onnxruntime runs on the CPU.

    Args:
        engine: The engine's file.
        graph: The graph's file.
        capability: The GPU that the engine was built for, such as `sm89`; or `current`, `portable`.
        module: `tensorrt` or `tensorrt-rtx`.

    Returns:
        The verdict and the report; or why the engine did not run, such as `built, not run: no GPU`, and None.
    """
    here = present_gpu()
    if here is None:
        return NO_GPU, None
    if capability not in {here, CURRENT, PORTABLE}:
        return f"{NOT_RUN}: this GPU is {here}", None
    candidate = _runner(engine, graph, module)
    report = compare_with_graph(candidate, graph)
    return report.verdict, report


def compare_with_graph(candidate: TensorRtRunner, graph: Path, seed: int = 0) -> Report:
    """Compare an engine with its graph, at sizes within the engine's profile."""
    reference = OnnxRuntimeRunner(graph)
    sizes = {dim.name: dim.traced for dim in candidate.dims}
    ranges = [DimRange(dim.name, dim.traced, dim.minimum, dim.maximum) for dim in candidate.dims]
    example = {spec.name: example_input(spec, sizes) for spec in candidate.inputs}
    example |= {name: limits.best for name, limits in candidate.profile.values.items()}
    return compare(
        reference,
        candidate,
        cases(list(candidate.inputs), ranges, example, seed, known=_known(candidate)),
        tolerance=Tolerance(None, None),
        routing=[],
    )


def _known(candidate: TensorRtRunner) -> Known:
    """What an engine's profile says of the values of its inputs: those that decide shapes are tried within it."""
    limits = candidate.profile.limits
    meanings = {
        name: Meaning(ordinary=(int(low.min()), int(high.max()))) for name, (low, high) in limits.items()
    }
    return Known(limits=limits, meanings=meanings)


def example_input(spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """Standard normal floats (seed 0) of the given sizes; zeros for integers, since every table has a row 0."""
    shape: list[Any] = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    dtype = numpy_dtype(spec.dtype)
    if spec.dtype.startswith(("float", "bfloat")):
        return np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype)


def not_run(statuses: list[str]) -> MissingBackendError | None:
    """The error of `--require-run` for engines that were not run, from their `run_status`; None if all were."""
    missing = [status for status in statuses if status.startswith(NOT_RUN)]
    if not missing:
        return None
    return MissingBackendError(
        f"{missing[0]} (--require-run)",
        hint="the engines are written; on a machine with their GPU: "
        "moe-export verify model.sm89.engine --against model.py",
    )
