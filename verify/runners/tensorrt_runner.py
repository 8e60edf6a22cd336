"""A serialized TensorRT engine as an engine to compare with: on a GPU, with buffers on the device.

This file is independent of which TensorRT built the engine; the caller supplies the module (`Backend`). PyTorch holds
the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_export.errors import UsageError
from moe_export.tensorrt_api import IExecutionContext, present_gpu
from moe_export.verify.runner import RunFailedError
from moe_export.verify.runners.engine_loading import RTX, Backend, LoadedEngine, Weights, errors, load_engine
from moe_export.verify.runners.engine_profile import profile_of
from moe_export.verify.runners.kernel_cache import wait_for_kernels
from moe_export.verify.runners.tensorrt_buffers import (
    Cuda,
    from_bytes,
    host_memory,
    on_host,
    output_allocator,
    to_bytes,
)
from moe_export.verify.specs import Array, TensorSpec

if TYPE_CHECKING:
    import torch


class TensorRtRunner:
    """Run a serialized engine.

    Args:
        engine: Path of an engine.
        backend: The TensorRT that built it.
        profile: Which of its profiles.
        shapes: Names of free axes by input, as the graph that it was built from has them; they tell which axes are
            one dimension.
        weights: Gives the graph that it was built from, for an engine without weights; None if it is not there.

    Attributes:
        name: "tensorrt-rtx" or "tensorrt".
        profile: What it takes.
        inputs: The inputs; a free axis is called `<input>_dim<axis>`.
        outputs: The outputs.
        dims: What the profile allows of each free axis; `traced` is the size that it is fastest at.

    Raises:
        UsageError: No such file; no engine; one of another version, or for other GPUs; no such profile.
        MissingBackendError: There is no GPU.
        RunFailedError: TensorRT cannot prepare a run.
    """

    def __init__(
        self,
        engine: str | Path,
        backend: Backend,
        profile: int = 0,
        shapes: Mapping[str, Sequence[int | str]] | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.name = backend.name
        self._where = str(engine)
        self._loaded = load_engine(Path(engine), backend, present_gpu(), weights)
        self._cuda = Cuda()
        self._context = self._prepared(self._loaded, backend)
        if not self._context.set_optimization_profile_async(profile, self._cuda.stream):
            raise UsageError(
                f"{engine} has no profile {profile} that is free: {errors(self._loaded.log)}",
                hint="an engine has as many profiles as it was built with --range, counted from 0",
            )
        self._cuda.wait()
        self._allocator = output_allocator(backend.trt, self._cuda)
        self._host = backend.trt.TensorLocation.HOST
        self.profile = profile_of(self._loaded.engine, backend.trt, profile, shapes or {})
        self.inputs, self.outputs = self.profile.inputs, self.profile.outputs
        self.dims = self.profile.dims

    def _prepared(self, loaded: LoadedEngine, backend: Backend) -> IExecutionContext:
        """What runs the engine, with kernels for the shapes of each run."""
        config = loaded.engine.create_runtime_config()
        if config is None:
            raise self._failed("it cannot be prepared for a run")
        self._kernels = wait_for_kernels(config, backend.trt, loaded.plan) if backend.name == RTX else None
        self._compiled: set[tuple[tuple[int, ...], ...]] = set()
        context = loaded.engine.create_execution_context(runtime_config=config)
        if context is None:
            raise self._failed(
                "it cannot be prepared for a run",
                hint="free memory of the GPU, or build it for smaller sizes: --range, --workspace",
            )
        return context

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises:
            UsageError: A name, dtype, size or value that the engine does not take; it says what it takes.
            RunFailedError: TensorRT failed, with its reason.
        """
        self.profile.check(inputs, self._where)
        arrays = {spec.name: np.asarray(inputs[spec.name]) for spec in self.inputs}
        held = {name: self._set_input(name, array) for name, array in arrays.items()}
        given = {spec.name: self._set_output(spec) for spec in self.outputs}
        self._cuda.begin()
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._failed("it did not run")
        self._cuda.wait()
        held.clear()  # inputs have to live until the run has ended
        self._keep_kernels(tuple(array.shape for array in arrays.values()))
        return {spec.name: self._result(spec, given[spec.name]) for spec in self.outputs}

    def _set_input(self, name: str, array: Array) -> torch.Tensor:
        """Give an input its shape and its memory: on the device, but for values that TensorRT reads on the host."""
        if not self._context.set_input_shape(name, array.shape):
            raise self._failed(f"it takes no {name} of shape {list(array.shape)}")
        raw = to_bytes(array)
        memory = on_host(raw) if self._on_host(name) else self._cuda.copy(raw)
        self._set_address(name, memory)
        return memory

    def _set_output(self, spec: TensorSpec) -> torch.Tensor | None:
        """Give an output memory on the host, or what allocates it on the device."""
        if not self._on_host(spec.name):
            if not self._context.set_output_allocator(spec.name, self._allocator):
                raise self._failed(f"it takes no memory for output {spec.name}")
            return None
        size = self._context.get_max_output_size(spec.name)
        if size < 0:
            raise self._failed(f"the size of output {spec.name} is not known")
        memory = host_memory(size)
        self._set_address(spec.name, memory)
        return memory

    def _set_address(self, name: str, memory: torch.Tensor) -> None:
        if not self._context.set_tensor_address(name, memory.data_ptr()):
            raise self._failed(f"it takes no memory for {name}")

    def _on_host(self, name: str) -> bool:
        return self._loaded.engine.get_tensor_location(name) == self._host

    def _result(self, spec: TensorSpec, memory: torch.Tensor | None) -> Array:
        if memory is not None:
            return from_bytes(memory, spec.dtype, tuple(self._context.get_tensor_shape(spec.name)))
        if spec.name not in self._allocator.shapes:
            raise self._failed(f"it gave no output {spec.name}")
        return from_bytes(self._allocator.buffers[spec.name], spec.dtype, self._allocator.shapes[spec.name])

    def _keep_kernels(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Keep what was compiled for shapes that were not run before."""
        if self._kernels is not None and shapes not in self._compiled:
            self._compiled.add(shapes)
            self._kernels.save()

    def _failed(self, what: str, hint: str | None = None) -> RunFailedError:
        return RunFailedError(
            f"{self.name}: {what}: {errors(self._loaded.log)}", where=self._where, hint=hint
        )
