"""Measure one backend in a process of its own, so that memory is counted separately and a crash ends nothing else."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from moe_export.backends import OPENVINO
from moe_export.errors import MissingBackendError, MoeExportError
from moe_export.verify.runners.openvino_runner import OpenVinoRunner
from moe_export.verify.specs import Array

Run = Callable[[Mapping[str, Array]], Any]


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        backend: `torch` or `torch.compile`, each optionally followed by `-cuda`; `onnxruntime-cpu`, `onnxruntime-cuda`,
            `onnxruntime-tensorrt`, `openvino` or `engine`.
        path: The graph, the engine, or the model's file.
        inputs: The inputs of every run, by name.
        dtype: The narrowest type that a graph computes in.
        init, shapes: Arguments and inputs of a model given as a class, as on the command line.
        warmup, repeat: The number of runs before measuring, and of measured runs.
        flops: FLOPs of one run; 0 if unknown.
        bytes_moved: The fewest bytes that one run reads and writes.
    """

    backend: str
    path: str
    inputs: Mapping[str, Array]
    dtype: str = "float32"
    init: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    warmup: int = 5
    repeat: int = 50
    flops: int = 0
    bytes_moved: int = 0

    @property
    def on_gpu(self) -> bool:
        """Whether the backend runs on a GPU."""
        return self.backend == "engine" or self.backend.endswith(("-cuda", "-tensorrt"))


class _Named(TypedDict):
    name: str


class TimingEntry(_Named, total=False):
    """What was measured of a backend; only `reason` where it did not run."""

    reason: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    calls_per_second: float
    memory: int
    bound_ms: float
    note: str


@dataclass(frozen=True)
class Timing:
    """The measurements of one backend.

    Attributes:
        name: The backend, or the engine's file.
        milliseconds: The latency of each run, including copies to and from a device; empty if it did not run.
        memory: Bytes, weights included: the growth of the process's peak memory; on a GPU the growth of the memory in
            use, without the CUDA context.
        reason: Why it did not run; empty if it did.
        bound: The least milliseconds for the job's FLOPs, or for moving its bytes, at the speed that the machine had
            right after the runs; 0 if unknown.
        note: A remark on the figures, e.g. which nodes a GPU provider left to the CPU.
    """

    name: str
    milliseconds: tuple[float, ...] = ()
    memory: int = 0
    reason: str = ""
    bound: float = 0.0
    note: str = ""

    def quantile(self, share: float) -> float:
        """The latency in ms below which this share of the runs stays: 0.5 is the median."""
        return float(np.quantile(self.milliseconds, share))

    def to_dict(self) -> TimingEntry:
        """Plain data: median, p10 and p90 in ms, calls per second, bytes; or why it did not run."""
        if self.reason:
            return {"name": self.name, "reason": self.reason}
        median = self.quantile(0.5)
        return {
            "name": self.name,
            "median_ms": median,
            "p10_ms": self.quantile(0.1),
            "p90_ms": self.quantile(0.9),
            "calls_per_second": 1000 / median,
            "memory": self.memory,
            "bound_ms": self.bound,
            "note": self.note,
        }


def measure(job: Job) -> Timing:
    """Measure a job in a new process; a job that fails gives a `Timing` with the reason."""
    name = Path(job.path).name if job.backend == "engine" else job.backend
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return replace(pool.submit(_measure, job).result(), name=name)
        except MoeExportError as error:
            return Timing(name, reason=error.what)
        except BrokenProcessPool:
            return Timing(name, reason="it crashed the process")
        except Exception as error:  # a model or an engine may raise anything
            return Timing(
                name, reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )


def _measure(job: Job) -> Timing:
    import torch  # before the first reading, so that no backend's memory includes it

    used = _device_memory if job.on_gpu and torch.cuda.is_available() else _peak
    before = used()
    run, note = _open(job)
    for _ in range(job.warmup):
        run(job.inputs)
    milliseconds = []
    for _ in range(job.repeat):
        start = time.perf_counter()
        run(job.inputs)
        milliseconds.append(1000 * (time.perf_counter() - start))
    memory = used() - before
    return Timing(
        job.backend, tuple(milliseconds), memory, bound=_bound(job) if job.flops else 0.0, note=note
    )


def _bound(job: Job) -> float:
    """The least milliseconds for a job's FLOPs or bytes at this machine's present speed.

    Speeds are those of an (n, n) matrix product, 2 n³ FLOPs, and of a copy that reads and writes 128 MiB each; medians
    of five.
    """
    import torch

    device = "cuda" if job.on_gpu and torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    dtype = getattr(torch, job.dtype) if device == "cuda" else torch.float32
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.ones(32 * 2**20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def seconds(work: Callable[[], Any]) -> float:
        found = []
        for _ in range(6):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return float(np.median(found[1:]))  # the first run allocates and loads kernels

    flops_rate = 2 * size**3 / seconds(lambda: matrix @ matrix)
    bytes_rate = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    return 1000 * max(job.flops / flops_rate, job.bytes_moved / bytes_rate)


def _open(job: Job) -> tuple[Run, str]:
    """The function that runs a job once, and a note on it for the reader."""
    if job.backend.startswith("torch"):
        return _torch(job), ""
    if job.backend == "engine":
        from moe_export.running.engines import open_engine

        return open_engine(Path(job.path)).run, ""
    if job.backend == OPENVINO:
        return OpenVinoRunner(job.path).run, ""
    from moe_export.running.choices import runner_of

    runner = runner_of(Path(job.path), job.backend.removeprefix("onnxruntime-"), job.dtype, exact=False)
    return runner.run, f"left {runner.elsewhere} to the CPU" if runner.elsewhere else ""


def _torch(job: Job) -> Run:
    import dataclasses

    import torch

    from moe_export.export.frontend.load import load_subject
    from moe_export.verify import TorchRunner

    kind, _, device = job.backend.partition("-")
    if device and not torch.cuda.is_available():
        raise MissingBackendError("no GPU that PyTorch can use", hint="install PyTorch for CUDA")
    subject = load_subject(job.path, init=job.init, inputs=job.shapes)
    module: Any = subject.module.to(device or "cpu")
    if kind == "torch.compile":
        module = torch.compile(module, dynamic=False)
    subject = dataclasses.replace(subject, module=module, state=subject.state.like(subject.module))
    return TorchRunner(subject.call_named, subject.outputs, device=device or "cpu").run


def _peak() -> int:
    """The peak memory of this process so far, in bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # on Linux `ru_maxrss` starts at what the parent process had
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"), re.MULTILINE)
        if found is not None:
            return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_memory() -> int:
    """Bytes of the GPU's memory in use, by all processes."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)
