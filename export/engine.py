"""Build serialized TensorRT engines from an ONNX graph, one a compute capability, without a GPU where RTX can.

```
model.onnx ─▶ engine_profiles ─▶ engine (parse, build) ─▶ Engine ─▶ model.sm89.engine
                Range, shapes         │
                                      └▶ engine_failure: Refusals that name the node and the user's line
```
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnx_ir as ir

from moe_export.errors import MissingBackendError, UsageError
from moe_export.export.engine_failure import build_refusals, parse_refusals, refused
from moe_export.export.engine_module import CURRENT, Module, check_capabilities, errors_in, load_module
from moe_export.export.engine_profiles import (
    Range,
    Ranges,
    complete_ranges,
    free_dims,
    input_shapes,
    shapes_at,
)

Step = Callable[[str], AbstractContextManager[Any]]
_INLINE = 2**31 - 2**24  # protobuf cannot hold 2 GiB
NOT_RUN = "built, not run: no GPU"


@dataclass(frozen=True)
class Engine:
    """A serialized engine and how it was made.

    Attributes:
        capability: The GPUs that it is for, `sm89`; `current` for the one that built it.
        module, version: What built it; it runs with this version only.
        plan: The bytes.
        seconds: Parsing and building.
        profiles: The ranges of each profile, by dimension.
    """

    capability: str
    module: str
    version: str
    plan: bytes = field(repr=False)
    seconds: float
    profiles: tuple[Mapping[str, Range], ...]

    @property
    def size(self) -> int:
        """Bytes of the engine."""
        return len(self.plan)


def build_engines(
    model: str | Path | onnx.ModelProto | ir.Model,
    capabilities: Sequence[str],
    ranges: Ranges | Sequence[Ranges] | None = None,
    *,
    module: str | None = None,
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
        module: `tensorrt_rtx` or `tensorrt`; None chooses by the capabilities.
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
    graph, path = read_graph(model)
    dims = free_dims(graph)
    several = [ranges or {}] if ranges is None or isinstance(ranges, Mapping) else list(ranges)
    profiles = tuple(complete_ranges(dims, one) for one in several or [{}])
    built = []
    with as_file(graph, path) as file:
        for capability in wanted:
            with step(f"building {capability} with {builder.name} {builder.version}"):
                built.append(_build(builder, graph, file, capability, profiles))
    return tuple(built)


def read_graph(model: str | Path | onnx.ModelProto | ir.Model) -> tuple[ir.Model, Path | None]:
    """A model for TensorRT's parser, and its file if it has one.

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
    try:
        graph = ir.load(path)
    except Exception as error:
        raise UsageError(f"{path} is no ONNX model: {error}") from error
    if not graph.graph.outputs:
        raise UsageError(f"{path} is no ONNX model: it has no outputs", hint="give an .onnx file")
    return graph, path


def _build(
    module: Module,
    graph: ir.Model,
    path: Path,
    capability: str,
    profiles: Sequence[Mapping[str, Range]],
) -> Engine:
    start = time.perf_counter()
    trt, log = module.trt, module.log()
    builder = trt.Builder(log)
    if not builder:
        raise _no_gpu(module, log)
    network = builder.create_network(module.network_flags())
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise refused(parse_refusals(parser, graph), f"{module.name} cannot read the graph")
    config = builder.create_builder_config()
    module.aim(config, capability)
    shapes = input_shapes(graph)
    for ranges in profiles:
        config.add_optimization_profile(_profile(builder, network, shapes_at(shapes, ranges)))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        if capability == CURRENT and any("CUDA" in text or "Cuda" in text for text in errors_in(log)):
            raise _no_gpu(module, log)
        raise refused(build_refusals(log, graph, capability), f"no engine for {capability}")
    seconds = time.perf_counter() - start
    return Engine(capability, module.name, module.version, bytes(plan), seconds, tuple(profiles))


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


def _no_gpu(module: Module, log: Any) -> MissingBackendError:
    listed = ", ".join(module.capabilities)
    reason = next(iter(errors_in(log)), "it found no device")
    return MissingBackendError(
        f"{module.name} cannot build for the GPU of this machine: {reason}",
        hint=f"name what to build for: {listed}" if listed else "full TensorRT builds only where a GPU is",
    )
