"""A serialized TensorRT engine as an engine to compare with: on a GPU, with buffers on the device.

This file is independent of which TensorRT built the engine; the caller supplies the module (`Backend`). PyTorch holds
the buffers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_export.errors import MissingBackendError, UsageError
from moe_export.verify.runner import RunFailedError, shorten
from moe_export.verify.runners.engine_header import read_header
from moe_export.verify.specs import Array, DimRange, TensorSpec, describe, numpy_dtype

RTX = "tensorrt-rtx"
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


class Backend(Protocol):
    """The parts of an imported TensorRT that are used."""

    @property
    def name(self) -> str:
        """`tensorrt-rtx` or `tensorrt`."""
        ...

    @property
    def version(self) -> str:
        """Its version; an engine runs with the version that built it."""
        ...

    @property
    def trt(self) -> Any:
        """The module."""
        ...

    def log(self) -> Any:
        """An empty logger with `messages`, `(severity, text)`."""
        ...


class TensorRtRunner:
    """Run a serialized engine.

    Args:
        engine: Path of an engine.
        backend: The TensorRT that built it.
        profile: Which of its profiles.
        shapes: Names of free axes by input, as the graph that it was built from has them; they tell which axes are
            one dimension.

    Attributes:
        name: "tensorrt-rtx" or "tensorrt".
        inputs: The inputs; a free axis is called `<input>_dim<axis>`.
        outputs: The outputs.
        dims: What the profile allows of each free axis; `traced` is the size that it is fastest at.

    Raises:
        UsageError: No such file; no engine; one of another version, or for other GPUs.
        MissingBackendError: There is no GPU.
    """

    def __init__(
        self,
        engine: str | Path,
        backend: Backend,
        profile: int = 0,
        shapes: Mapping[str, Sequence[int | str]] | None = None,
    ) -> None:
        self.name = backend.name
        self._where = str(engine)
        gpu = present_gpu()
        plan = read_engine(Path(engine), backend, gpu)
        if gpu is None:
            raise MissingBackendError(
                f"built, not run: no GPU that PyTorch can use ({self._where})",
                hint="run it where an NVIDIA GPU, its driver and PyTorch for CUDA are",
            )
        self._log = backend.log()
        self._runtime = backend.trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise _not_loaded(self._log, self._where, backend, gpu)
        self._context = self._engine.create_execution_context()
        self._stream = _torch().cuda.Stream()
        self._context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        self._allocator = _allocator(backend.trt)
        self._host = backend.trt.TensorLocation.HOST
        self._names = shapes or {}
        input_mode = backend.trt.TensorIOMode.INPUT
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        taken = [name for name in names if self._engine.get_tensor_mode(name) == input_mode]
        self.inputs = tuple(self._spec(name) for name in taken)
        self.outputs = tuple(self._spec(name) for name in names if name not in taken)
        found = (dim for spec in self.inputs for dim in self._ranges(spec, profile))
        self.dims = tuple({dim.name: dim for dim in found}.values())

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises:
            UsageError: A name, dtype or size that the engine does not take; it says what it takes.
            RunFailedError: TensorRT failed, with its reason.
        """
        self._check(inputs)
        torch = _torch()
        buffers = {spec.name: self._buffer(spec.name, np.asarray(inputs[spec.name])) for spec in self.inputs}
        for name, buffer in buffers.items():
            if not self._context.set_input_shape(name, tuple(buffer.shape)):
                raise self._failed(f"it takes no {name} of shape {list(buffer.shape)}")
            self._context.set_tensor_address(name, buffer.data_ptr())
        for spec in self.outputs:
            self._context.set_output_allocator(spec.name, self._allocator)
        torch.cuda.current_stream().synchronize()
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise self._failed("it did not run")
        self._stream.synchronize()
        return {spec.name: self._allocator.array(spec.name, spec.dtype) for spec in self.outputs}

    def _spec(self, name: str) -> TensorSpec:
        dtype = self._engine.get_tensor_dtype(name).name
        names = self._names.get(name, ())
        shape = tuple(
            int(size) if size >= 0 else str(names[axis]) if axis < len(names) else f"{name}_dim{axis}"
            for axis, size in enumerate(self._engine.get_tensor_shape(name))
        )
        return TensorSpec(name, _DTYPES.get(dtype, dtype.lower()), shape)

    def _ranges(self, spec: TensorSpec, profile: int) -> list[DimRange]:
        low, best, high = self._engine.get_tensor_profile_shape(spec.name, profile)
        return [
            DimRange(size, best[axis], low[axis], high[axis])
            for axis, size in enumerate(spec.shape)
            if isinstance(size, str)
        ]

    def _check(self, inputs: Mapping[str, Array]) -> None:
        allowed = {dim.name: dim for dim in self.dims}
        problems = []
        for spec in self.inputs:
            array = inputs.get(spec.name)
            if (
                array is None
                or np.asarray(array).dtype.name != spec.dtype
                or np.ndim(array) != len(spec.shape)
            ):
                problems.append(
                    f"input {spec.name} is {'missing' if array is None else describe(np.asarray(array))}"
                )
                continue
            for want, got in zip(spec.shape, np.shape(array), strict=True):
                if isinstance(want, int) and want != got:
                    problems.append(f"input {spec.name} is {describe(np.asarray(array))}")
                elif isinstance(want, str) and not allowed[want].minimum <= got <= (
                    allowed[want].maximum or got
                ):
                    limits = f"{allowed[want].minimum} to {allowed[want].maximum}"
                    problems.append(
                        f"input {spec.name} has {want} = {got}, the engine's profile takes {limits}"
                    )
        if problems:
            raise UsageError(
                "; ".join(problems), where=self._where, hint="build it with other sizes: --range"
            )

    def _buffer(self, name: str, array: Array) -> Any:
        """A tensor for an input: on the device, but for sizes, which TensorRT reads on the host."""
        contiguous = np.ascontiguousarray(array).reshape(array.shape)
        if contiguous.dtype.name == "bfloat16":
            contiguous = contiguous.view(np.int16)
        tensor = _torch().from_numpy(contiguous)
        return tensor if self._engine.get_tensor_location(name) == self._host else tensor.cuda()

    def _failed(self, what: str) -> RunFailedError:
        return RunFailedError(f"{self.name}: {what}: {_errors(self._log)}", where=self._where)


def _torch() -> Any:
    import torch

    return torch


def read_engine(path: Path, backend: Backend, gpu: str | None) -> bytes:
    """The bytes of an engine that this TensorRT may load, as far as its header shows.

    Args:
        path: The engine.
        backend: Will run it.
        gpu: Will run it, `sm89`; None if there is none.

    Raises:
        UsageError: No such file; no engine; cut off; of another version; for other GPUs.
    """
    if not path.is_file():
        raise UsageError(
            f"no such file: {path}", hint="moe-export build model.onnx --engine sm89 makes engines"
        )
    plan = path.read_bytes()
    header = read_header(plan)
    if backend.name != RTX:
        if header is not None:
            raise UsageError(
                f"{path} is an engine of TensorRT-RTX, which {backend.name} cannot load",
                hint=f"--backend tensorrt-rtx, or build it with --builder {backend.name}",
            )
        return plan
    if header is None:
        raise UsageError(
            f"{path} is no engine of TensorRT-RTX", hint="moe-export build model.onnx --engine sm89"
        )
    if header.version != backend.version:
        raise UsageError(
            f"{path} was built by {backend.name} {header.version}, and this is {backend.version}: an engine runs "
            "with the version that built it",
            hint=f"build it again here, or install {backend.name} {header.version}",
        )
    if len(plan) != header.size:
        raise UsageError(
            f"{path} is damaged: it has {len(plan)} bytes of {header.size}", hint="copy it or build it again"
        )
    if gpu is not None and not header.runs_on(gpu):
        raise UsageError(
            f"{path} was built for {', '.join(header.gpus)}, and this GPU is {gpu}",
            hint=f"build it for this GPU: --engine {gpu}",
        )
    return plan


def present_gpu() -> str | None:
    """The GPU that PyTorch would use, `sm89`; None if there is none."""
    cuda = _torch().cuda
    return "sm{}{}".format(*cuda.get_device_capability()) if cuda.is_available() else None


def _not_loaded(log: Any, where: str, backend: Backend, gpu: str) -> UsageError:
    return UsageError(
        f"{backend.name} {backend.version} cannot load {where} on this GPU ({gpu}): {_errors(log)}",
        hint=f"build it for this GPU: --engine {gpu}, or --engine current",
    )


def _errors(log: Any) -> str:
    texts = [text for severity, text in log.messages if severity <= 1]
    return shorten(
        "; ".join(re.sub(r"\s+", " ", text) for text in dict.fromkeys(texts)) or "no reason given", 400
    )


def _allocator(trt: Any) -> Any:
    """Gives TensorRT memory for its outputs, whose sizes may depend on the data."""
    torch = _torch()

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.buffers: dict[str, Any] = {}
            self.shapes: dict[str, tuple[int, ...]] = {}

        def reallocate_output_async(
            self, name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            return self.reallocate_output(name, memory, size, alignment)

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            held = self.buffers.get(name)
            if held is None or held.numel() < size:
                self.buffers[name] = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
            return int(self.buffers[name].data_ptr())

        def notify_shape(self, name: str, shape: Any) -> None:
            self.shapes[name] = tuple(shape)

        def array(self, name: str, dtype: str) -> Array:
            kind, shape = numpy_dtype(dtype), self.shapes[name]
            size = int(np.prod(shape)) * kind.itemsize
            raw = self.buffers[name][:size].cpu().numpy().tobytes() if size else b""
            return np.frombuffer(raw, dtype=kind).reshape(shape).copy()

    return Allocator()
