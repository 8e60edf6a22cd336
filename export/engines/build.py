"""Build serialized TensorRT engines from an ONNX graph, one a compute capability, without a GPU where RTX can.

```
model.onnx ─▶ profiles ─▶ build (parse, build) ─▶ Engine ─▶ model.sm89.engine
            Range, shapes        │
                                 └▶ failure: Refusals that name the node and the user's line
```
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import onnx
import onnx_ir as ir

from moe_export.errors import MissingBackendError, NotExportableError, UsageError
from moe_export.export.engines.failure import build_refusals, corner_refusals, parse_refusals
from moe_export.export.engines.graph_file import as_file, fitted, read_graph
from moe_export.export.engines.layers import compiled_layers, memory, network_layers
from moe_export.export.engines.module import CURRENT, RTX, Module, check_capabilities, errors_in, load_module
from moe_export.export.engines.profiles import Range, Ranges, input_shapes, shapes_at
from moe_export.export.engines.refusal import refused
from moe_export.export.engines.rules import moe_layers, packed_types
from moe_export.export.engines.settings import Settings, check_settings, configure
from moe_export.export.engines.shape_inputs import complete_profile, set_values, value_names
from moe_export.export.engines.timing_cache import keep_timings
from moe_export.tensorrt_api import Builder, IBuilderConfig, ILogger, INetworkDefinition, present_gpu

Step = Callable[[str], AbstractContextManager[Any]]
_NEEDS_GPU = re.compile(r"cudaError|CUDA_SUCCESS|Cuda Runtime")


class EngineFacts(TypedDict):
    """What a report says of an engine."""

    capability: str
    module: str
    version: str
    size: int
    seconds: float
    profiles: list[dict[str, list[int]]]
    settings: dict[str, bool | int | str]
    memory: dict[str, int]
    notes: list[str]


@dataclass(frozen=True)
class Engine:
    """A serialized engine and how it was made.

    Attributes:
        capability: The GPUs that it is for, `sm89`; `current` for the one that built it.
        module, version: What built it; it runs with this version only.
        plan: The bytes.
        seconds: Parsing and building.
        profiles: The ranges of each profile, by dimension.
        settings: How it was built, where that was not the default.
        memory: Bytes that it takes at its greatest sizes, as far as the builder says them.
        layers: What it is made of, as plain data: `network`, the layers of the graph, and `engine`, those that
            they were fused into.
        notes: What a reader should know.
    """

    capability: str
    module: str
    version: str
    plan: bytes = field(repr=False)
    seconds: float
    profiles: tuple[Mapping[str, Range], ...]
    settings: Mapping[str, bool | int | str] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the engine."""
        return len(self.plan)

    def to_dict(self) -> EngineFacts:
        """What a report says of it: everything but its bytes and layers."""
        return {
            "capability": self.capability,
            "module": self.module,
            "version": self.version,
            "size": self.size,
            "seconds": round(self.seconds, 3),
            "profiles": [
                {name: [found.minimum, found.best, found.maximum] for name, found in profile.items()}
                for profile in self.profiles
            ],
            "settings": dict(self.settings),
            "memory": dict(self.memory),
            "notes": list(self.notes),
        }


def build_engines(
    model: str | Path | onnx.ModelProto | ir.Model,
    capabilities: Sequence[str],
    ranges: Ranges | Sequence[Ranges] | None = None,
    *,
    module: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    step: Step = nullcontext,
) -> tuple[Engine, ...]:
    """Build one engine a compute capability.

    Args:
        model: An ONNX file or model.
        capabilities: `sm75`, `sm80`, `sm86`, `sm89`, `sm120`, `sm121`, or `portable` for every GPU from Ampere on
            (TensorRT-RTX, no GPU needed); `current` for the GPU that is present.
        ranges: `{"sequence": (1, 512, 4096)}`: least, best and greatest size of a dynamic dimension, or value of an
            input that decides shapes; a list of such for several profiles. A dimension that is not named has 1:1:8
            (`batch`) or 1:128:1024, within what the graph's metadata says it is right for.
        module: `tensorrt-rtx` or `tensorrt`; None chooses by the capabilities.
        settings: What else may be chosen.
        step: Called with the name of each long step; shows progress.

    Returns:
        The engines, in the order of the capabilities.

    Raises:
        UsageError: Unreadable model; unknown capability or dimension; a range that is not in order.
        MissingBackendError: TensorRT is not installed.
        NotExportableError: TensorRT refuses the graph; names the node and the model's line.

    Example:
        >>> engines = build_engines("model.onnx", ["sm89"], {"sequence": (1, 512, 4096)})  # doctest: +SKIP
        >>> Path("model.sm89.engine").write_bytes(engines[0].plan)  # doctest: +SKIP
    """
    builder = load_module(module, [name.strip().lower() for name in capabilities])
    wanted = check_capabilities(capabilities, builder)
    check_settings(settings, builder)
    graph, path = read_graph(model)
    several = [ranges or {}] if ranges is None or isinstance(ranges, Mapping) else list(ranges)
    profiles = tuple(complete_profile(graph, one) for one in several or [{}])
    built = []
    for capability in wanted:
        with step(f"building {capability} with {builder.name} {builder.version}"):
            _check_layers(graph, capability, builder)
            changed, file, notes = fitted(graph, path, capability, builder.name)
            with as_file(changed, file) as named:
                engine = _build(builder, changed, named, capability, profiles, settings)
            built.append(replace(engine, notes=(*notes, *engine.notes)))
    return tuple(built)


def _build(
    module: Module,
    graph: ir.Model,
    path: Path,
    capability: str,
    profiles: Sequence[Mapping[str, Range]],
    settings: Settings,
) -> Engine:
    start = time.perf_counter()
    log = module.log()
    builder = _builder(module, log)
    network, config = builder.create_network(module.network_flags()), builder.create_builder_config()
    if network is None or config is None:
        raise _no_gpu(module, log)
    parser = module.trt.OnnxParser(network, log)  # holds weights until the engine is built
    if not parser.parse_from_file(str(path)):
        raise refused(
            parse_refusals(parser, graph, module), f"{module.name} {module.version} cannot read the graph"
        )
    module.aim(config, capability)
    timings = configure(config, settings, module)
    _add_profiles(builder, network, config, graph, profiles)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _not_built(module, log, graph, capability, settings)
    impossible = corner_refusals(log, graph)
    if impossible:
        raise refused(
            impossible, f"the graph cannot run at all sizes that the {capability} engine shall take"
        )
    kept = keep_timings(config, settings.timing_cache) if settings.timing_cache is not None else ""
    engine = Engine(
        capability,
        module.name,
        module.version,
        bytes(plan),
        time.perf_counter() - start,
        tuple(profiles),
        settings.facts(),
        memory(log),
        {"network": network_layers(network), "engine": compiled_layers(log)},
        (kept,) if kept else (),
    )
    del parser, network, config, builder, timings  # in this order: the timings have to outlive the builder
    return engine


def _builder(module: Module, log: ILogger) -> Builder:
    """A builder; its constructor raises where it finds no driver."""
    try:
        module.add_plugins(log)
        return module.trt.Builder(log)
    except (TypeError, RuntimeError) as error:
        raise _no_gpu(module, log) from error


def _add_profiles(
    builder: Builder,
    network: INetworkDefinition,
    config: IBuilderConfig,
    graph: ir.Model,
    profiles: Sequence[Mapping[str, Range]],
) -> None:
    """Shapes of every input, and values of those that decide shapes."""
    shapes, names = input_shapes(graph), value_names(graph)
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes_at(shapes, ranges).items():
            profile.set_shape(name, low, best, high)
        set_values(profile, network, ranges, names)
        if config.add_optimization_profile(profile) < 0:
            sizes = ", ".join(f"{name}={found}" for name, found in ranges.items())
            raise UsageError(f"TensorRT does not take the profile {sizes}", hint="other sizes: --range")


def _check_layers(graph: ir.Model, capability: str, module: Module) -> None:
    """Refuse what a builder is known to fail on after a long time."""
    found = () if capability == CURRENT else tuple(moe_layers(graph, capability))
    if module.name == RTX:
        found += tuple(packed_types(graph, capability))
    if found:
        raise refused(found, f"{module.name} {module.version} builds no {capability}")


def has_gpu() -> bool:
    """Whether this machine has a GPU that PyTorch can use."""
    return present_gpu() is not None


def _not_built(
    module: Module, log: ILogger, graph: ir.Model, capability: str, settings: Settings
) -> MissingBackendError | NotExportableError:
    """The error for a graph that was read, and of which no engine was made."""
    needs_gpu = any(_NEEDS_GPU.search(text) for text in errors_in(log))
    if needs_gpu and capability == CURRENT:
        return _no_gpu(module, log)
    if needs_gpu and (settings.refit or settings.strip_weights):
        return MissingBackendError(
            f"{module.name} {module.version} needs a GPU to build an engine whose weights can be replaced or left out",
            hint="build it on a machine with an NVIDIA driver, or without --refit and --strip-weights",
        )
    return refused(
        build_refusals(log, graph, capability, module),
        f"{module.name} {module.version} builds no {capability}",
    )


def _no_gpu(module: Module, log: ILogger) -> MissingBackendError:
    reason = next(iter(errors_in(log)), "it found no device")
    return MissingBackendError(
        f"{module.name} cannot build for the GPU of this machine: {reason}",
        hint=f"name what to build for: {', '.join(module.capabilities)}"
        if module.name == RTX
        else "full TensorRT builds only where a GPU is",
    )
