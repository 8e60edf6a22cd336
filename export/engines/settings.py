"""What may be chosen of a build beside the GPU and the sizes: weights left out, memory, a cache."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_export.errors import UsageError
from moe_export.export.engines.module import FULL, Module


@dataclass(frozen=True)
class Settings:
    """How to build.

    Attributes:
        strip_weights: Leave the weights out; they are put in when the engine is loaded. Implies `refit`.
        refit: Make an engine whose weights can be replaced.
        workspace: The most memory in bytes that the engine may use for intermediate values; None is no limit.
        tf32: Let float32 products round their factors to 10 bits, which is faster, and too coarse for the logits of
            a router: another expert may win.
        timing_cache: A file that keeps what was timed, for the next build; full TensorRT only.
    """

    strip_weights: bool = False
    refit: bool = False
    workspace: int | None = None
    timing_cache: Path | None = None
    tf32: bool = False

    def facts(self) -> dict[str, bool | int | str]:
        """What is not as it is by default, for a report."""
        every = {
            "strip_weights": self.strip_weights,
            "refit": self.refit or self.strip_weights,
            "workspace": self.workspace,
            "tf32": self.tf32,
            "timing_cache": str(self.timing_cache) if self.timing_cache else None,
        }
        return {name: value for name, value in every.items() if value}


def check_settings(settings: Settings, module: Module) -> None:
    """Refuse what the module cannot do.

    Raises:
        UsageError: A timing cache for TensorRT-RTX, which times nothing in a build; no room for anything.
    """
    if settings.timing_cache is not None and module.name != FULL:
        raise UsageError(
            f"a timing cache is of no use to {module.name}: it times nothing in the build",
            hint="its kernels are compiled, and can be cached, when the engine runs first",
        )
    if settings.workspace is not None and settings.workspace <= 0:
        raise UsageError("a workspace of no bytes", hint="for example: --workspace 2GB")


def configure(config: Any, settings: Settings, module: Module) -> None:
    """Put the settings into a builder's configuration."""
    trt = module.trt
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if settings.refit or settings.strip_weights:
        config.set_flag(trt.BuilderFlag.REFIT)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.timing_cache is not None:
        old = settings.timing_cache.read_bytes() if settings.timing_cache.is_file() else b""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            config.set_timing_cache(config.create_timing_cache(old), ignore_mismatch=False)


def keep_timings(config: Any, settings: Settings) -> None:
    """Write what was timed into the cache's file."""
    if settings.timing_cache is not None:
        settings.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
