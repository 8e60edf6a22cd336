"""Memory for the inputs and outputs of an engine: bytes on the GPU, or on the host for sizes.

An array goes to TensorRT as bytes. Types of 4 bits are two to a byte there, the first in the lower half, and one to a
byte in NumPy. An empty array has no address, and TensorRT takes no input without one: it gets memory of one byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_export.errors import UsageError
from moe_export.tensorrt_api import TensorRt
from moe_export.verify.specs import Array, numpy_dtype

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "E8M0": "float8_e8m0fnu",
    "FP4": "float4_e2m1fn",
    "INT4": "int4",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_HALF_BYTES = {"int4", "float4_e2m1fn"}
_ALIGNMENT = 256  # what TensorRT asks of an address; PyTorch gives 512 on a GPU, and 64 on the host


def dtype_of(name: str, dtype: str) -> str:
    """What NumPy or ml_dtypes call a type of TensorRT's.

    Args:
        name: Who has it, for the error.
        dtype: TensorRT's name of it, `BF16`.

    Raises:
        UsageError: It is not known.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"{name} is {dtype}, a type that cannot be exchanged with an engine here")
    return _DTYPES[dtype]


class Cuda:
    """The GPU, as PyTorch has it: memory, and a stream of its own."""

    def __init__(self) -> None:
        import torch

        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.cuda_stream)

    def memory(self, count: int) -> torch.Tensor:
        """So many bytes, uint8 (count,)."""
        import torch

        return torch.empty(count, dtype=torch.uint8, device="cuda")

    def copy(self, raw: Array) -> torch.Tensor:
        """Bytes of the host, on the GPU: uint8 (bytes,), at least one."""
        import torch

        return torch.from_numpy(raw).cuda() if raw.size else self.memory(1)

    def begin(self) -> None:
        """Wait for the copies."""
        import torch

        torch.cuda.current_stream().synchronize()

    def wait(self) -> None:
        """Wait for the run."""
        self._stream.synchronize()


def host_memory(count: int) -> torch.Tensor:
    """So many bytes on the host, at least one, at an address that TensorRT takes: uint8 (count,)."""
    import torch

    whole = torch.empty(max(count, 1) + _ALIGNMENT, dtype=torch.uint8)
    start = -whole.data_ptr() % _ALIGNMENT
    return whole[start : start + max(count, 1)]


def on_host(raw: Array) -> torch.Tensor:
    """Bytes at an address of the host that TensorRT takes: uint8 (bytes,), at least one."""
    import torch

    memory = host_memory(raw.size)
    memory[: raw.size] = torch.from_numpy(raw)
    return memory


def to_bytes(array: Array) -> Array:
    """An array as TensorRT reads it: uint8 (bytes,), which PyTorch may write to."""
    data = np.ascontiguousarray(array).reshape(-1)
    raw: Array = data.view(np.uint8)
    if data.dtype.name in _HALF_BYTES:
        halves = np.zeros(raw.size + raw.size % 2, np.uint8)
        halves[: raw.size] = raw & 0xF
        raw = halves[0::2] | halves[1::2] << 4
    return raw if raw.flags.writeable else raw.copy()


def from_bytes(memory: torch.Tensor, dtype: str, shape: Sequence[int]) -> Array:
    """An array as TensorRT wrote it; a later run does not change it."""
    kind, count = numpy_dtype(dtype), prod(shape)
    size = -(-count // 2) if dtype in _HALF_BYTES else count * kind.itemsize
    raw: Array = memory[:size].to("cpu", copy=True).numpy()
    if dtype in _HALF_BYTES:
        halves = np.stack([raw & 0xF, raw >> 4], axis=-1).reshape(-1)[:count]
        # ml_dtypes reads a negative int4 from a byte whose upper half repeats the sign.
        negative = (halves >= 8) & (dtype == "int4")
        raw = np.where(negative, halves | 0xF0, halves).astype(np.uint8)
    return raw.view(kind).reshape(shape)


def output_allocator(trt: TensorRt, cuda: Cuda) -> Any:
    """Gives TensorRT memory for its outputs on the GPU, whose sizes may depend on the data.

    Attributes:
        buffers: The memory, by output.
        shapes: The shapes, by output, as TensorRT says them during a run.
    """

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.buffers: dict[str, torch.Tensor] = {}
            self.shapes: dict[str, tuple[int, ...]] = {}

        def reallocate_output_async(
            self, name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            held = self.buffers.get(name)
            if held is None or held.numel() < size:
                try:
                    self.buffers[name] = cuda.memory(max(size, 1))
                except RuntimeError:  # out of memory: TensorRT ends the run, and says so
                    return 0
            return int(self.buffers[name].data_ptr())

        def notify_shape(self, name: str, shape: Any) -> None:
            self.shapes[name] = tuple(shape)

    return Allocator()
