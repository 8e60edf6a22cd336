"""Where things run, how fast that is, and how long a part may take."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

Run = Callable[[], Any]
ROUNDS = 15


@dataclass(frozen=True)
class Device:
    """The GPU; or the CPU in its place, to rehearse.

    Attributes:
        kind: `cuda` or `cpu`, as PyTorch and onnxruntime's providers are called.
    """

    kind: str

    @property
    def name(self) -> str:
        """What the page calls it."""
        return torch.cuda.get_device_name() if self.kind == "cuda" else "no GPU: the CPU in its place"

    def wait(self) -> None:
        """Until everything that was started is done."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    @cached_property
    def speed(self) -> tuple[float, float]:
        """FLOP/s of a float32 matrix product and bytes/s of a copy, medians of five."""
        size = 8192 if self.kind == "cuda" else 1024
        matrix = torch.ones(size, size, device=self.kind)
        source = torch.ones(32 * 2**20, device=self.kind)
        target = torch.empty_like(source)
        product = self._seconds(lambda: matrix @ matrix)
        copy = self._seconds(lambda: target.copy_(source))
        return 2 * size**3 / product, 2 * source.nbytes / copy

    def roofline(self, flops: float, moved: float) -> float:
        """The least ms for so many FLOPs, or for moving so many bytes."""
        return 1000 * max(flops / self.speed[0], moved / self.speed[1])

    def _seconds(self, work: Run) -> float:
        found = []
        for _ in range(6):
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found[1:])  # the first one loads kernels


@dataclass
class Budget:
    """The seconds of a part, and what was cut because they were over.

    Attributes:
        seconds: How many there are.
        cut: What was left out, in words.
    """

    seconds: float
    cut: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def allows(self, what: str) -> bool:
        """Whether there is time to begin this; if not, it is written down."""
        if self.left > 0:
            return True
        self.cut.append(what)
        return False


class Graph:
    """A graph in onnxruntime on the device, its inputs and outputs staying there.

    Raises:
        Exception: Onnxruntime refuses the graph, or has no such provider here.
    """

    def __init__(self, path: Path, device: Device) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # Products in TF32 have 10 bits, which are too few for a router's logits.
        if device.kind == "cuda":
            onnxruntime.preload_dlls()
        gpu: list[Any] = [("CUDAExecutionProvider", {"use_tf32": "0"})] if device.kind == "cuda" else []
        self.session = onnxruntime.InferenceSession(path, options, providers=[*gpu, "CPUExecutionProvider"])
        if gpu and "CUDAExecutionProvider" not in self.session.get_providers():
            raise RuntimeError("onnxruntime fell back to the CPU")
        self._device = device
        self.names = [output.name for output in self.session.get_outputs()]

    def outputs(self, inputs: Mapping[str, Any]) -> list[Any]:
        """What it computes, as arrays."""
        return list(self.session.run(self.names, {name: inputs[name] for name in self.inputs}))

    @property
    def inputs(self) -> list[str]:
        """Names of what it takes."""
        return [value.name for value in self.session.get_inputs()]

    def bound(self, inputs: Mapping[str, Any]) -> Run:
        """A run whose inputs are on the device already, and whose outputs stay there."""
        binding = self.session.io_binding()
        for name in self.inputs:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(inputs[name]), self._device.kind, 0
            )
            binding.bind_ortvalue_input(name, value)
        for name in self.names:
            binding.bind_output(name, self._device.kind, 0)
        return lambda: self.session.run_with_iobinding(binding)


def medians(runs: Mapping[str, Run], device: Device, budget: Budget) -> dict[str, float]:
    """The ms of each, medians of rounds in an order drawn anew, after one round that loads kernels."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        if number > 3 and budget.left < 0:
            break
        for name in random.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            device.wait()
            if number:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def on_device(inputs: Mapping[str, Any], device: Device) -> dict[str, torch.Tensor]:
    """Arrays as tensors on the device."""
    return {name: torch.from_numpy(np.array(value)).to(device.kind) for name, value in inputs.items()}
