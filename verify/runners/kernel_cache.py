"""The kernels that TensorRT-RTX compiles while an engine runs, kept for the next process that runs it.

TensorRT-RTX compiles a kernel for the shapes at hand when it first meets them. By default it does so beside the run,
which uses a slower kernel meanwhile: two runs of the same inputs differ in time, and in their last bits. Here a run
waits for its kernels (`EAGER`), and a file holds them, one an engine: `~/.cache/moe-export/kernels/<hash>.bin`. A file
of another version, driver or GPU is refused by TensorRT-RTX, and written anew.
"""

from __future__ import annotations

import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from moe_export.tensorrt_api import IRuntimeCache, IRuntimeConfig, TensorRt


class KernelCache:
    """The kernels of one engine.

    Args:
        kernels: TensorRT-RTX's.
        path: The file that they are kept in.
    """

    def __init__(self, kernels: IRuntimeCache, path: Path) -> None:
        self._kernels, self._path = kernels, path

    def save(self) -> None:
        """Write the kernels that there are now; a folder that cannot be written to means that none are kept."""
        found = self._kernels.serialize()
        if found is None:
            return
        own = self._path.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(bytes(found))
            own.replace(self._path)


def wait_for_kernels(config: IRuntimeConfig, trt: TensorRt, plan: bytes) -> KernelCache | None:
    """Let an engine's runs wait for its kernels, and start with those that are kept.

    Args:
        config: How the engine will run.
        trt: TensorRT-RTX.
        plan: The engine's bytes, which the file of kernels is named by.

    Returns:
        The kernels; None if TensorRT-RTX keeps none.
    """
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    kernels = config.create_runtime_cache()
    if kernels is None:
        return None
    path = _folder() / f"{sha256(plan).hexdigest()[:32]}.bin"
    with suppress(OSError):
        if not kernels.deserialize(path.read_bytes()):
            path.unlink()  # of another version, driver or GPU; the next save writes a new one
    return KernelCache(kernels, path) if config.set_runtime_cache(kernels) else None


def _folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "moe-export" / "kernels"
