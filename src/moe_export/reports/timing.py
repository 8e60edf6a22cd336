"""Time the model in PyTorch and its graph in ONNX Runtime, in this process, at the example's sizes.

A few runs for a rough comparison; `moe-export bench` measures each in a process of its own.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from moe_export.export.frontend.subject import Subject
from moe_export.export.onnx.simplify import as_numpy
from moe_export.verify import Array, OnnxRuntimeRunner, Runner, TorchRunner

_WARM_UP, _MOST, _SECONDS = 3, 50, 0.5  # unmeasured runs; measured runs, and seconds for them, at most


def timings_of(subject: Subject, graph: Path, provider: str) -> list[tuple[str, int, float]]:
    """Rows of (runner, number of runs, median in milliseconds).

    Args:
        subject: The model.
        graph: Its graph, in float32.
        provider: Where onnxruntime runs, `cpu` or `cuda`.

    Raises:
        Exception: The model or onnxruntime failed.
    """
    inputs = {name: as_numpy(tensor) for name, tensor in subject.inputs.items()}
    model = TorchRunner(subject.call_named, subject.outputs, "PyTorch, eager")
    runtime = OnnxRuntimeRunner(graph, provider, exact=False)
    runners: tuple[Runner, ...] = (model, runtime)
    return [(runner.name, *_measured(runner, inputs)) for runner in runners]


def _measured(runner: Runner, inputs: Mapping[str, Array]) -> tuple[int, float]:
    for _ in range(_WARM_UP):
        runner.run(inputs)
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < _MOST and (not found or time.perf_counter() - start < _SECONDS):
        before = time.perf_counter()
        runner.run(inputs)
        found.append(1000 * (time.perf_counter() - before))
    return len(found), median(found)


def machine() -> str:
    """The processor, the number of its cores, and the system, to be shown beside timings."""
    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
