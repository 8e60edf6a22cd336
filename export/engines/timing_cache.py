"""The timings of full TensorRT: a file that a build reads before, and writes after."""

from __future__ import annotations

from pathlib import Path

from moe_export.errors import UsageError
from moe_export.tensorrt_api import IBuilderConfig, ITimingCache


def use_timings(config: IBuilderConfig, path: Path) -> ITimingCache:
    """Let a build use the timings in a file, or collect new ones if there is no file yet.

    Returns:
        The cache; it has to live until the engine is built.

    Raises:
        UsageError: The file holds no timings, or those of another GPU or TensorRT.
    """
    old = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(old)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        what = f"{path} has no timings that can be used here"
        raise UsageError(
            f"{what}: they are of another GPU or TensorRT"
            if cache is not None
            else f"{what}: it is no cache",
            hint="name another file, or delete it: --timing-cache new.bin",
        )
    return cache


def keep_timings(config: IBuilderConfig, path: Path) -> str:
    """Write what was timed into a file; a note if there is nothing to write."""
    cache = config.get_timing_cache()
    found = cache.serialize() if cache is not None else None
    if found is None:
        return f"no timings were kept in {path}: TensorRT gave none"
    path.write_bytes(bytes(found))
    return ""
