"""Load a serialized engine: its header is read, TensorRT loads it, and weights that were left out are put back.

Every step that TensorRT refuses is an error that says which, of which file, why, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from moe_export.errors import MissingBackendError, UsageError
from moe_export.tensorrt_api import ICudaEngine, ILogger, OnnxParserRefitter, Runtime, TensorRt
from moe_export.verify.runner import shorten
from moe_export.verify.runners.engine_header import read_header

RTX = "tensorrt-rtx"
Weights: TypeAlias = Callable[[], AbstractContextManager[Path]]
"""Gives the graph that an engine was built from, as a file."""


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
    def trt(self) -> TensorRt:
        """The module."""
        ...

    def log(self) -> ILogger:
        """An empty logger with `messages`, `(severity, text)`."""
        ...


@dataclass(frozen=True, eq=False)
class LoadedEngine:
    """An engine on its GPU, and what has to live as long.

    Attributes:
        plan: Its file's bytes.
        engine: The engine.
        runtime: What loaded it.
        log: What TensorRT says of it.
    """

    plan: bytes
    engine: ICudaEngine
    runtime: Runtime
    log: ILogger


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


def load_engine(path: Path, backend: Backend, gpu: str | None, weights: Weights | None) -> LoadedEngine:
    """Load an engine on the GPU of this machine.

    Args:
        path: The engine.
        backend: Loads it.
        gpu: The GPU, `sm89`; None if there is none.
        weights: Gives the graph that it was built from; None if that is not there.

    Raises:
        UsageError: It cannot be loaded, or its weights were left out and cannot be put back.
        MissingBackendError: There is no GPU, or no driver that TensorRT can use.
    """
    plan = read_engine(path, backend, gpu)
    if gpu is None:
        raise MissingBackendError(
            f"built, not run: no GPU that PyTorch can use ({path})",
            hint="run it where an NVIDIA GPU, its driver and PyTorch for CUDA are",
        )
    log = backend.log()
    try:
        if backend.name != RTX and not backend.trt.init_libnvinfer_plugins(log, ""):
            log.messages.append((1, "its plugins cannot be loaded"))
            raise RuntimeError
        runtime = backend.trt.Runtime(log)
    except (TypeError, RuntimeError) as error:  # the constructor raises where TensorRT returns nothing
        raise MissingBackendError(
            f"built, not run: {backend.name} {backend.version} finds no driver that it can use ({path}): "
            f"{errors(log)}",
            hint="install an NVIDIA driver for this version of TensorRT",
        ) from error
    if backend.name != RTX:
        # An engine that later versions run holds code of its own. It is trusted as any model file that is run.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UsageError(
            f"{backend.name} {backend.version} cannot load {path} on this GPU ({gpu}): {errors(log)}",
            hint=f"build it for this GPU: --engine {gpu}, or --engine current",
        )
    loaded = LoadedEngine(plan, engine, runtime, log)
    if engine.get_engine_stat(backend.trt.EngineStat.STRIPPED_WEIGHTS_SIZE) > 0:
        _put_weights_back(loaded, path, backend, weights)
    return loaded


def _put_weights_back(loaded: LoadedEngine, path: Path, backend: Backend, weights: Weights | None) -> None:
    """Give an engine that was built without weights those of its graph."""
    if weights is None:
        raise UsageError(
            f"{path} was built without its weights, and they are in the graph that it was built from",
            hint="put that graph beside it: model.onnx beside model.sm89.engine",
        )
    refitter = backend.trt.Refitter(loaded.engine, loaded.log)
    parser = backend.trt.OnnxParserRefitter(refitter, loaded.log)
    with weights() as graph:
        if not parser.refit_from_file(str(graph)):
            raise UsageError(
                f"the weights of {path} cannot be read from {graph.name}: {_refused(parser, loaded.log)}",
                hint="put the graph that it was built from beside it, or build it again",
            )
        if not refitter.refit_cuda_engine():
            missing = ", ".join(refitter.get_missing_weights()[:4])
            raise UsageError(
                f"{path} does not take the weights of {graph.name}: "
                + (f"it misses {missing}" if missing else errors(loaded.log)),
                hint="put the graph that it was built from beside it, or build it again",
            )


def _refused(parser: OnnxParserRefitter, log: ILogger) -> str:
    told = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    return shorten("; ".join(told), 400) if told else errors(log)


def errors(log: ILogger) -> str:
    """What TensorRT gave as the reason of an error."""
    texts = [text for severity, text in log.messages if severity <= 1]
    return shorten(
        "; ".join(re.sub(r"\s+", " ", text) for text in dict.fromkeys(texts)) or "no reason given", 400
    )
