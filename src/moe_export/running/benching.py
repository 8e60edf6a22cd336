"""Measure one backend in a process of its own, so that its memory is its own and a crash is only its own."""

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
from typing import Any

import numpy as np

from moe_export.errors import MissingBackendError, MoeExportError
from moe_export.verify.specs import Array

Run = Callable[[Mapping[str, Array]], Any]


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        backend: `torch`, `torch.compile`, either with `-cuda` behind it, `onnxruntime-cpu`, `onnxruntime-cuda`,
            `onnxruntime-tensorrt` or `engine`.
        path: The graph, the engine, or the model's file.
        inputs: What it is run on, by name.
        dtype: The narrowest type that a graph computes in.
        init, shapes: Arguments and inputs of a model given as a class, as on the command line.
        warmup, repeat: Runs before, and runs that are measured.
        flops: Of one run; 0 if that is not known.
        bytes_moved: The least that one run reads and writes.
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
        """Whether it is to run on a GPU."""
        return self.backend == "engine" or self.backend.endswith(("-cuda", "-tensorrt"))


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        name: What was run.
        milliseconds: Each run's latency, copies to and from a device included; empty if it did not run.
        memory: Bytes, weights included: growth of the process's peak memory; on a GPU what is taken of its memory
            after the runs and was not before, the context of CUDA not counted.
        reason: Why it did not run.
        bound: The least milliseconds that the machine, as fast as it was just then, needs for the graph's FLOPs, or to
            read its weights once; 0 if that is not known.
        note: What a reader of its figures should know.
    """

    name: str
    milliseconds: tuple[float, ...] = ()
    memory: int = 0
    reason: str = ""
    bound: float = 0.0
    note: str = ""

    def quantile(self, share: float) -> float:
        """The latency in ms that this share of the runs stays below."""
        return float(np.quantile(self.milliseconds, share))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: median, p10, p90 in ms, calls a second, bytes; or why it did not run."""
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
    """Measure in a new process."""
    name = Path(job.path).name if job.backend == "engine" else job.backend
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return replace(pool.submit(_measure, job).result(), name=name)
        except MoeExportError as error:
            return Timing(name, reason=error.what)
        except BrokenProcessPool:
            return Timing(name, reason="it crashed the process")
        except Exception as error:  # whatever an engine raises
            return Timing(
                name, reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )


def _measure(job: Job) -> Timing:
    import torch  # in every process, so in nobody's memory

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
    """The least milliseconds for a job's FLOPs and bytes on this machine, as fast as it is now.

    The speed of a matrix product of 2 n³ FLOPs, and of a copy of 256 MB; medians of five.
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
        return float(np.median(found[1:]))

    flops_rate = 2 * size**3 / seconds(lambda: matrix @ matrix)
    bytes_rate = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    return 1000 * max(job.flops / flops_rate, job.bytes_moved / bytes_rate)


def _open(job: Job) -> tuple[Run, str]:
    """What runs it, and what is to be said of that."""
    if job.backend.startswith("torch"):
        return _torch(job), ""
    if job.backend == "engine":
        from moe_export.running.engines import open_engine

        return open_engine(Path(job.path)).run, ""
    from moe_export.running.choices import runner_of

    runner = runner_of(Path(job.path), job.backend.removeprefix("onnxruntime-"), job.dtype)
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
    """The most memory that this process has had so far, in bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # on Linux `ru_maxrss` starts at what the parent process had
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"), re.MULTILINE)
        if found is not None:
            return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_memory() -> int:
    """Bytes of the GPU's memory that are taken, by whomever."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)
