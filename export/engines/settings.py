"""What may be chosen of a build beside the GPU and the sizes: weights left out, memory, a cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_export.errors import UsageError
from moe_export.export.engines.module import FULL, Module
from moe_export.export.engines.timing_cache import use_timings
from moe_export.tensorrt_api import IBuilderConfig, ITimingCache

WINDOWS = "windows"


@dataclass(frozen=True)
class Settings:
    """How to build.

    Attributes:
        strip_weights: Leave the weights out; the same ones are put in when the engine is loaded.
        refit: Make an engine whose weights can be replaced.
        workspace: The most memory in bytes that the engine may use for intermediate values; None is no limit.
        tf32: Let float32 products round their factors to 10 bits, which is faster, and too coarse for the logits of
            a router: another expert may win.
        timing_cache: A file that keeps what was timed, for the next build; full TensorRT only.
        version_compatible: Make an engine that later versions run, too; full TensorRT only.
        platform: Where it is to run, `windows`; None is where it is built. Full TensorRT only: engines of TensorRT-RTX
            run on both.
    """

    strip_weights: bool = False
    refit: bool = False
    workspace: int | None = None
    timing_cache: Path | None = None
    tf32: bool = False
    version_compatible: bool = False
    platform: str | None = None

    def facts(self) -> dict[str, bool | int | str]:
        """What is not as it is by default, for a report."""
        every = {
            "strip_weights": self.strip_weights,
            "refit": self.refit,
            "workspace": self.workspace,
            "tf32": self.tf32,
            "timing_cache": str(self.timing_cache) if self.timing_cache else None,
            "version_compatible": self.version_compatible,
            "platform": self.platform,
        }
        return {name: value for name, value in every.items() if value}


def check_settings(settings: Settings, module: Module) -> None:
    """Refuse what the module cannot do.

    Raises:
        UsageError: A timing cache for TensorRT-RTX, which times nothing in a build; other versions or another platform
            for TensorRT-RTX; no room for anything.
    """
    if settings.timing_cache is not None and module.name != FULL:
        raise UsageError(
            f"a timing cache is of no use to {module.name}: it times nothing in the build",
            hint="its kernels are compiled, and can be cached, when the engine runs first",
        )
    if settings.version_compatible and module.name != FULL:
        raise UsageError(
            f"an engine of {module.name} runs with the version that built it only",
            hint="--builder tensorrt builds engines that later versions run",
        )
    if settings.platform is not None and module.name != FULL:
        raise UsageError(
            f"an engine of {module.name} runs on Linux and Windows as it is", hint="leave out --platform"
        )
    if settings.workspace is not None and settings.workspace <= 0:
        raise UsageError("a workspace of no bytes", hint="for example: --workspace 2GB")


def configure(config: IBuilderConfig, settings: Settings, module: Module) -> ITimingCache | None:
    """Put the settings into a builder's configuration.

    Returns:
        What has to live until the engine is built.

    Raises:
        UsageError: The timings were taken elsewhere.
    """
    trt, flags = module.trt, module.trt.BuilderFlag
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not settings.tf32:
        config.clear_flag(flags.TF32)
    if settings.strip_weights:
        config.set_flag(flags.STRIP_PLAN)
    if settings.strip_weights and not settings.refit and module.name == FULL:
        # The same weights are put back: TensorRT 11.3 drops biases of products with REFIT, and none with this.
        config.set_flag(flags.REFIT_IDENTICAL)
    elif settings.refit or settings.strip_weights:
        config.set_flag(flags.REFIT)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.version_compatible:
        config.set_flag(flags.VERSION_COMPATIBLE)
    if settings.platform == WINDOWS:
        config.runtime_platform = trt.RuntimePlatform.WINDOWS_AMD64
        if settings.version_compatible:  # the runtime in the engine would be this platform's
            config.set_flag(flags.EXCLUDE_LEAN_RUNTIME)
    return use_timings(config, settings.timing_cache) if settings.timing_cache is not None else None
