"""The module that builds engines: TensorRT-RTX or full TensorRT, behind one small adapter.

Both have the same API (`Builder`, `OnnxParser`, profiles). What differs is here and nowhere else:

| | TensorRT-RTX (`tensorrt-rtx`) | TensorRT (`tensorrt`) |
|---|---|---|
| builds for | compute capabilities by name, without a GPU; all from Ampere on; the GPU present | the GPU present, \
all of its capability, all from Ampere on; other versions and Windows |
| typing | always strongly typed | strongly typed by a flag before version 11 |
| constructors without a driver | `Builder` works | raise |
| operators as plugins | none | to be registered first |
| cache | of kernels, compiled when the engine runs first | of tactics, timed in the build |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from moe_export.errors import MissingBackendError, UsageError
from moe_export.tensorrt_api import IBuilderConfig, ILogger, TensorRt, present_gpu

CURRENT = "current"  # the GPU of this machine
PORTABLE = "portable"  # every GPU from Ampere on, with TensorRT-RTX
RTX, FULL = "tensorrt-rtx", "tensorrt"
_INSTALL = {RTX: "pip install 'moe-export[rtx]'", FULL: "pip install 'moe-export[tensorrt]'"}
_OLDEST = {RTX: (1, 7), FULL: (10, 14)}  # the first with all that `tensorrt_api` names
_ERROR = 1  # severities: 0 internal error, 1 error, 2 warning, 3 info, 4 verbose


@dataclass(frozen=True)
class Module:
    """An imported TensorRT.

    Attributes:
        name: `tensorrt-rtx` or `tensorrt`.
        trt: The module itself.
    """

    name: str
    trt: TensorRt

    @property
    def version(self) -> str:
        """Its version, `1.7.1.116`; an engine runs with the version that built it."""
        return str(self.trt.__version__)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What it can build for besides the very GPU that is present.

        TensorRT-RTX: `sm75`, `sm80`, ..., `portable`, without a GPU. Full TensorRT: GPUs like the present one, `sm89`,
        and `portable`.
        """
        if self.name == RTX:
            listed = self.trt.ComputeCapability.__members__
            return (*(name.lower() for name in listed if name.startswith("SM")), PORTABLE)
        gpu = present_gpu()
        return () if gpu is None else (gpu, PORTABLE)

    def network_flags(self) -> int:
        """The flags of a strongly typed network, whose types are those of the graph."""
        flags = self.trt.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0

    def add_plugins(self, log: ILogger) -> None:
        """Let a parser know the operators that full TensorRT has as plugins.

        Raises:
            RuntimeError: They cannot be loaded.
        """
        if self.name == FULL and not self.trt.init_libnvinfer_plugins(log, ""):
            log.messages.append((_ERROR, "its plugins cannot be loaded"))
            raise RuntimeError

    def aim(self, config: IBuilderConfig, capability: str) -> None:
        """Let a builder's configuration build for one capability.

        Raises:
            UsageError: TensorRT does not take it.
        """
        if self.name == RTX and capability != PORTABLE:
            config.num_compute_capabilities = 1
            target = getattr(self.trt.ComputeCapability, capability.upper())
            if not config.set_compute_capability(target, 0):
                raise UsageError(f"{self.name} {self.version} does not build for {capability}")
        elif self.name == FULL and capability != CURRENT:
            levels = self.trt.HardwareCompatibilityLevel
            level = levels.AMPERE_PLUS if capability == PORTABLE else levels.SAME_COMPUTE_CAPABILITY
            config.hardware_compatibility_level = level

    def log(self) -> ILogger:
        """The process's one logger for this module, emptied; it prints nothing.

        TensorRT takes the first logger that it is given and ignores later ones while anything made with it lives.
        Its `messages` are `(severity, text)`.
        """
        if self.name not in _LOGS:
            _LOGS[self.name] = _new_log(self.trt)
        _LOGS[self.name].messages.clear()
        return _LOGS[self.name]


_LOGS: dict[str, ILogger] = {}


def _new_log(trt: TensorRt) -> ILogger:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((int(severity.value), message))

    return cast(ILogger, Log())


def errors_in(log: ILogger) -> list[str]:
    """The errors that a logger was told, each once, in order."""
    return list(dict.fromkeys(text for severity, text in log.messages if severity <= _ERROR))


def load_module(name: str | None = None, capabilities: Sequence[str] = ()) -> Module:
    """Import TensorRT.

    Args:
        name: `tensorrt-rtx` or `tensorrt`; None takes TensorRT-RTX, or, to build for the GPU that is present, full
            TensorRT if it is installed.
        capabilities: What it is to build for.

    Raises:
        UsageError: No such module.
        MissingBackendError: It is not installed, cannot be loaded, or is too old.
    """
    if name not in {None, RTX, FULL}:
        raise UsageError(f"no engine builder {name!r}", hint=f"there are {RTX} and {FULL}")
    if name is None and set(capabilities) == {CURRENT} and _installed(FULL):
        name = FULL
    name = name or RTX
    imported = name.replace("-", "_")
    try:
        module = Module(name, cast(TensorRt, import_module(imported)))
    except ImportError as error:
        raise MissingBackendError(
            f"{name} is not installed: {error}"
            if error.name == imported
            else f"{name} cannot be loaded: {error}",
            hint=f"{_INSTALL[name]}, on a machine with or without a GPU"
            if name == RTX
            else f"{_INSTALL[name]}, on a machine with an NVIDIA GPU",
        ) from error
    oldest = _OLDEST[name]
    if tuple(map(int, module.version.split(".")[:2])) < oldest:
        raise MissingBackendError(
            f"{name} {module.version} is too old: {'.'.join(map(str, oldest))} or newer is needed",
            hint=_INSTALL[name],
        )
    return module


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def check_capabilities(capabilities: Sequence[str], module: Module) -> tuple[str, ...]:
    """Compute capabilities in lower case, each once, in the order that was asked for.

    Raises:
        UsageError: None was given, or the module cannot build for one of them; lists those that it can.
    """
    wanted = tuple(dict.fromkeys(name.strip().lower() for name in capabilities if name.strip()))
    known = (*module.capabilities, CURRENT)
    hint = f"{module.name} {module.version} builds for {', '.join(known)}"
    if not wanted:
        raise UsageError("no compute capability to build an engine for", hint=hint)
    for name in wanted:
        if name not in known:
            raise UsageError(f"no engine can be built for {name!r}", hint=hint)
    return wanted
