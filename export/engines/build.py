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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnx_ir as ir

from moe_export.errors import MissingBackendError, NotExportableError, UsageError
from moe_export.export.engines import turing
from moe_export.export.engines.failure import build_refusals, corner_refusals, parse_refusals
from moe_export.export.engines.layers import compiled_layers, memory, network_layers
from moe_export.export.engines.module import CURRENT, RTX, Module, check_capabilities, errors_in, load_module
from moe_export.export.engines.profiles import (
    Range,
    Ranges,
    complete_ranges,
    free_dims,
    input_shapes,
    shapes_at,
)
from moe_export.export.engines.refusal import refused
from moe_export.export.engines.rules import moe_layers
from moe_export.export.engines.settings import Settings, check_settings, configure, keep_timings
from moe_export.export.onnx.functions import without_functions
from moe_export.external_data import check_external_data

Step = Callable[[str], AbstractContextManager[Any]]
_INLINE = 2**31 - 2**24  # protobuf cannot hold 2 GiB
_NEEDS_GPU = re.compile(r"cudaError|CUDA_SUCCESS|Cuda Runtime")


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

    def to_dict(self) -> dict[str, Any]:
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
        ranges: `{"seq": (1, 512, 4096)}`: least, best and greatest size of a dynamic dimension; a list of such for
            several profiles. A dimension that is not named has 1:1:8 (`batch`) or 1:128:1024, within what the
            graph's metadata says it is right for.
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
        >>> engines = build_engines("model.onnx", ["sm89"], {"seq": (1, 512, 4096)})  # doctest: +SKIP
        >>> Path("model.sm89.engine").write_bytes(engines[0].plan)  # doctest: +SKIP
    """
    builder = load_module(module, [name.strip().lower() for name in capabilities])
    wanted = check_capabilities(capabilities, builder)
    check_settings(settings, builder)
    graph, path = read_graph(model)
    dims = free_dims(graph)
    several = [ranges or {}] if ranges is None or isinstance(ranges, Mapping) else list(ranges)
    profiles = tuple(complete_ranges(dims, one) for one in several or [{}])
    built = []
    for capability in wanted:
        with step(f"building {capability} with {builder.name} {builder.version}"):
            fitted, file, notes = _fit(graph, path, capability, builder)
            with as_file(fitted, file) as named:
                engine = _build(builder, fitted, named, capability, profiles, settings)
            built.append(replace(engine, notes=notes))
    return tuple(built)


def read_graph(model: str | Path | onnx.ModelProto | ir.Model) -> tuple[ir.Model, Path | None]:
    """A model for TensorRT's parser, its functions written out, and its file if it has one.

    Raises:
        UsageError: There is no such file, or no ONNX model in it.
    """
    if isinstance(model, ir.Model):
        return model, None
    if isinstance(model, onnx.ModelProto):
        return ir.from_proto(model), None
    path = Path(model)
    if not path.is_file():
        raise UsageError(f"no file {path}", hint="give an .onnx file")
    check_external_data(path)
    try:
        graph = ir.load(path)
    except Exception as error:
        raise UsageError(f"{path} is not an ONNX model: {error}") from error
    if not graph.graph.outputs:
        raise UsageError(f"{path} is not an ONNX model: it has no outputs", hint="give an .onnx file")
    return without_functions(graph), path


def _build(
    module: Module,
    graph: ir.Model,
    path: Path,
    capability: str,
    profiles: Sequence[Mapping[str, Range]],
    settings: Settings,
) -> Engine:
    start = time.perf_counter()
    trt, log = module.trt, module.log()
    builder = trt.Builder(log)
    if not builder:
        raise _no_gpu(module, log)
    network = builder.create_network(module.network_flags())
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise refused(parse_refusals(parser, graph), f"{module.name} {module.version} cannot read the graph")
    config = builder.create_builder_config()
    module.aim(config, capability)
    configure(config, settings, module)
    shapes = input_shapes(graph)
    for ranges in profiles:
        config.add_optimization_profile(_profile(builder, network, shapes_at(shapes, ranges)))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _not_built(module, log, graph, capability, settings)
    impossible = corner_refusals(log, graph)
    if impossible:
        raise refused(
            impossible, f"the graph cannot run at all sizes that the {capability} engine shall take"
        )
    keep_timings(config, settings)
    return Engine(
        capability,
        module.name,
        module.version,
        bytes(plan),
        time.perf_counter() - start,
        tuple(profiles),
        settings.facts(),
        memory(log),
        {"network": network_layers(network), "engine": compiled_layers(log)},
    )


def _fit(
    graph: ir.Model, path: Path | None, capability: str, module: Module
) -> tuple[ir.Model, Path | None, tuple[str, ...]]:
    """The graph as these GPUs can compute it, its file if that is the file's, and what was changed."""
    found = () if capability == CURRENT else tuple(moe_layers(graph, capability))
    if found:
        raise refused(found, f"{module.name} {module.version} builds no {capability}")
    if capability == turing.CAPABILITY and module.name == RTX:
        fitted, count = turing.without_float32_products(graph)
        if count:
            return fitted, None, (turing.NOTE.format(count=count),)
    return graph, path, ()


@contextmanager
def as_file(graph: ir.Model, path: Path | None) -> Iterator[Path]:
    """The file of a graph, for a parser that reads weights of any size; a temporary one if it has none."""
    if path is not None:
        yield path
        return
    with TemporaryDirectory(prefix="moe-export-") as folder:
        weights = [value.const_value for value in graph.graph.initializers.values()]
        large = sum(weight.nbytes for weight in weights if weight is not None) > _INLINE
        outside = large or any(isinstance(weight, ir.ExternalTensor) for weight in weights)
        file = Path(folder, "model.onnx")
        ir.save(graph, file, external_data="model.onnx.data" if outside else None)
        yield file


def _profile(builder: Any, network: Any, shapes: Mapping[str, tuple[tuple[int, ...], ...]]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *shapes[tensor.name])
    return profile


def has_gpu() -> bool:
    """Whether this machine has a GPU that PyTorch can use."""
    import torch

    return bool(torch.cuda.is_available())


def _not_built(
    module: Module, log: Any, graph: ir.Model, capability: str, settings: Settings
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
        build_refusals(log, graph, capability), f"{module.name} {module.version} builds no {capability}"
    )


def _no_gpu(module: Module, log: Any) -> MissingBackendError:
    listed = ", ".join(module.capabilities)
    reason = next(iter(errors_in(log)), "it found no device")
    return MissingBackendError(
        f"{module.name} cannot build for the GPU of this machine: {reason}",
        hint=f"name what to build for: {listed}" if listed else "full TensorRT builds only where a GPU is",
    )
