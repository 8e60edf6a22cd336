"""The header of a serialized TensorRT-RTX engine: the version that built it, its GPUs, its length.

TensorRT reads 64 bytes to tell whether an engine can be loaded (`IRuntime.engine_header_size`), on a machine with a
GPU. Read here they work on any machine, so that a wrong engine is refused with a reason before a driver loads. Their
meaning was found by comparing engines that TensorRT-RTX 1.7 built for each capability:

| bytes | |
|---|---|
| 0 to 3 | `vtrt`, in an engine of TensorRT-RTX |
| 16 to 23 | the length of the file |
| 24 to 27 | the version, 1.7.1.116 |
| 32 to 35 | the GPUs, a bit each |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LENGTH = 64
_MAGIC = b"vtrt"
_GPUS: Mapping[str, int] = {"sm75": 0, "sm80": 1, "sm86": 2, "sm89": 3, "sm120": 4, "sm121": 5}


@dataclass(frozen=True)
class EngineHeader:
    """The facts in an engine's header.

    Attributes:
        version: The TensorRT-RTX that built it, `1.7.1.116`; it runs with that one only.
        size: Bytes that it should have.
        gpus: What it was built for, as far as known here: `("sm89",)`, from `sm80` on for a portable one.
        complete: Whether `gpus` are all: no bit is set that is not known here.
    """

    version: str
    size: int
    gpus: tuple[str, ...]
    complete: bool

    def runs_on(self, gpu: str) -> bool:
        """Whether an engine may run on a GPU, `sm89`; what is not known is left to TensorRT to say."""
        return gpu in self.gpus or not self.complete or gpu not in _GPUS


def read_header(plan: bytes) -> EngineHeader | None:
    """The header of an engine; None if it is none of TensorRT-RTX.

    Args:
        plan: The file, or at least its first 64 bytes.
    """
    if plan[:4] != _MAGIC or len(plan) < LENGTH:
        return None
    bits = int.from_bytes(plan[32:36], "little")
    gpus = tuple(name for name, bit in _GPUS.items() if bits >> bit & 1)
    known = sum(1 << bit for bit in _GPUS.values())
    return EngineHeader(
        version=".".join(map(str, plan[24:28])),
        size=int.from_bytes(plan[16:24], "little"),
        gpus=gpus,
        complete=bool(bits) and not bits & ~known,
    )
