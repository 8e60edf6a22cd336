"""What is used of TensorRT: a type for each of its classes, with the members that are called, and no others.

TensorRT's bindings have no type stubs. These types are read twice: mypy holds every call of ours against them, and a
test (`tests/export/engine/test_bindings.py`) holds them against the bindings themselves: names, order and kind of
parameters, and which functions return a bool. So a call that neither TensorRT has cannot be written here.

TensorRT and TensorRT-RTX have the same classes; `RTX_ONLY` lists what only TensorRT-RTX has. What may be None is
written so, though the bindings do not say it: their manual does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

RTX_ONLY = frozenset(
    {
        "ComputeCapability",
        "DynamicShapesKernelSpecializationStrategy",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
        "IRuntimeCache",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.set_runtime_cache",
    }
)
"""Classes and members that full TensorRT does not have."""
OVERRIDDEN = {
    "ILogger": ("log",),
    "IOutputAllocator": ("notify_shape", "reallocate_output_async"),
}
"""Classes that we inherit from, and the methods that TensorRT calls."""
Size: TypeAlias = Sequence[int]


def present_gpu() -> str | None:
    """The GPU that PyTorch would use, `sm89`; None if there is none."""
    import torch

    return "sm{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


class ILogger(Protocol):
    """Takes what TensorRT says; ours keeps it."""

    messages: list[tuple[int, str]]
    """`(severity, text)`; ours, not TensorRT's."""


class Named(Protocol):
    """A member of an enumeration."""

    @property
    def name(self) -> str:
        """`FLOAT`."""
        ...


class BuilderFlag(Protocol):
    """A builder's configuration."""

    REFIT: Named
    REFIT_IDENTICAL: Named
    STRIP_PLAN: Named
    TF32: Named
    VERSION_COMPATIBLE: Named
    EXCLUDE_LEAN_RUNTIME: Named


class ComputeCapability(Protocol):
    """GPUs to build for, by name."""

    __members__: dict[str, Named]


class DynamicShapesKernelSpecializationStrategy(Protocol):
    """When kernels for the shapes at hand are compiled."""

    EAGER: Named


class EngineStat(Protocol):
    """What may be asked of an engine."""

    STRIPPED_WEIGHTS_SIZE: Named


class HardwareCompatibilityLevel(Protocol):
    """Which other GPUs an engine runs on."""

    AMPERE_PLUS: Named
    SAME_COMPUTE_CAPABILITY: Named


class MemoryPoolType(Protocol):
    """What a limit of memory is for."""

    WORKSPACE: Named


class NetworkDefinitionCreationFlag(Protocol):
    """How a network is created."""

    STRONGLY_TYPED: Any


class ProfilingVerbosity(Protocol):
    """How much an engine keeps of its layers."""

    DETAILED: Named


class RuntimePlatform(Protocol):
    """Where an engine is to run."""

    WINDOWS_AMD64: Named


class TensorIOMode(Protocol):
    """Whether a tensor is an input."""

    INPUT: Named


class TensorLocation(Protocol):
    """Where the memory of a tensor is."""

    HOST: Named


class IHostMemory(Protocol):
    """Bytes that TensorRT made."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """The bytes; copy them before the object goes."""
        ...


class ITensor(Protocol):
    """A tensor of a network."""

    name: str
    shape: Size
    dtype: Named

    @property
    def is_shape_tensor(self) -> bool:
        """Whether its values decide shapes: an input of this kind needs values in a profile."""
        ...


class ILayer(Protocol):
    """A layer of a network."""

    metadata: str | None
    name: str
    type: Named
    num_outputs: int

    def get_output(self, index: int) -> ITensor | None:
        """None for an output that is left out."""
        ...


class INetworkDefinition(Protocol):
    """What a parser makes of a graph."""

    num_inputs: int
    num_layers: int

    def get_input(self, index: int) -> ITensor:
        """An input."""
        ...

    def get_layer(self, index: int) -> ILayer:
        """A layer."""
        ...


class IOptimizationProfile(Protocol):
    """Least, best and greatest shapes, and values of inputs that decide shapes."""

    def set_shape(self, input: str, min: Size, opt: Size, max: Size) -> None:
        """Of an input of any kind."""
        ...

    def set_shape_input(self, input: str, min: Size, opt: Size, max: Size) -> None:
        """Of an input whose values decide shapes; must not be called for others."""
        ...


class ITimingCache(Protocol):
    """What full TensorRT timed."""

    def serialize(self) -> IHostMemory | None:
        """Its bytes."""
        ...


class IBuilderConfig(Protocol):
    """How an engine is to be built."""

    hardware_compatibility_level: Named
    num_compute_capabilities: int
    profiling_verbosity: Named
    runtime_platform: Named

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        """Its number; -1 if it is not valid."""
        ...

    def clear_flag(self, flag: Named) -> None:
        """Take a flag out."""
        ...

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        """None if the bytes are no cache; an empty cache for no bytes."""
        ...

    def get_timing_cache(self) -> ITimingCache | None:
        """None if none was set, or the one set was not taken."""
        ...

    def set_compute_capability(self, compute_capability: Named, index: int) -> bool:
        """False if it is not valid."""
        ...

    def set_flag(self, flag: Named) -> None:
        """Put a flag in."""
        ...

    def set_memory_pool_limit(self, pool: Named, pool_size: int) -> None:
        """In bytes."""
        ...

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        """False if it was made for another GPU or version. The cache must live until the engine is built."""
        ...


class Builder(Protocol):
    """Builds engines."""

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        """None if it cannot; why is in the log."""
        ...

    def create_builder_config(self) -> IBuilderConfig | None:
        """None if it cannot."""
        ...

    def create_network(self, flags: int) -> INetworkDefinition | None:
        """None if it cannot."""
        ...

    def create_optimization_profile(self) -> IOptimizationProfile:
        """An empty profile; it belongs to the builder."""
        ...


class ParserError(Protocol):
    """One thing that a parser refused."""

    def desc(self) -> str:
        """The reason."""
        ...

    def node(self) -> int:
        """The node's place in the graph; -1 if it is none."""
        ...

    def node_name(self) -> str:
        """The node's name."""
        ...

    def node_operator(self) -> str:
        """The node's operator."""
        ...


class OnnxParser(Protocol):
    """Reads a graph into a network; must live until the engine is built, for it holds weights."""

    num_errors: int

    def get_error(self, index: int) -> ParserError:
        """An error."""
        ...

    def parse_from_file(self, model: str) -> bool:
        """False if it refuses the graph."""
        ...


class OnnxParserRefitter(Protocol):
    """Reads the weights of a graph into a refitter."""

    num_errors: int

    def get_error(self, index: int) -> ParserError:
        """An error."""
        ...

    def refit_from_file(self, model: str) -> bool:
        """False if the graph cannot be read, or does not have every weight."""
        ...


class Refitter(Protocol):
    """Puts weights into an engine."""

    def get_missing_weights(self) -> list[str]:
        """The weights that are still to be given."""
        ...

    def refit_cuda_engine(self) -> bool:
        """False if a weight is missing or does not fit."""
        ...


class IRuntimeCache(Protocol):
    """The kernels that TensorRT-RTX compiled while engines ran."""

    def deserialize(self, blob: bytes) -> bool:
        """False if the bytes are of another version, driver or GPU."""
        ...

    def serialize(self) -> IHostMemory | None:
        """Its bytes."""
        ...


class IRuntimeConfig(Protocol):
    """How an engine is to run."""

    dynamic_shapes_kernel_specialization_strategy: Named

    def create_runtime_cache(self) -> IRuntimeCache | None:
        """An empty cache."""
        ...

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        """False if it is not taken."""
        ...


class IExecutionContext(Protocol):
    """An engine's state of execution."""

    def execute_async_v3(self, stream_handle: int) -> bool:
        """False if it could not be enqueued."""
        ...

    def get_max_output_size(self, name: str) -> int:
        """Bytes, at most, at the shapes that are set; -1 if they are not known."""
        ...

    def get_tensor_shape(self, name: str) -> Size:
        """With -1 for a size that is known only after the run."""
        ...

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """False if no profile that is chosen has it."""
        ...

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """False if there is no such profile; another context may hold it."""
        ...

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        """False if there is no such output."""
        ...

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """False if there is no such tensor; 0 unsets an address, and an input without one does not run."""
        ...


class ICudaEngine(Protocol):
    """An engine."""

    num_io_tensors: int

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext | None:
        """None if there is not enough memory, among other reasons."""
        ...

    def create_runtime_config(self) -> IRuntimeConfig | None:
        """How it runs by default, to be changed."""
        ...

    def get_engine_stat(self, stat: Named) -> int:
        """Bytes; -1 if it has no such thing."""
        ...

    def get_tensor_dtype(self, name: str) -> Named:
        """Its type."""
        ...

    def get_tensor_location(self, name: str) -> Named:
        """Where its memory is."""
        ...

    def get_tensor_mode(self, name: str) -> Named:
        """Whether it is an input."""
        ...

    def get_tensor_name(self, index: int) -> str:
        """The name of an input or output."""
        ...

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Size]:
        """Least, best and greatest shape."""
        ...

    def get_tensor_profile_values(self, profile: int, name: str, /) -> list[Size]:
        """Least, best and greatest values of an input that decides shapes.

        By position only: the bindings call the number `name` and the name `profile_index`.
        """
        ...

    def get_tensor_shape(self, name: str) -> Size:
        """With -1 for a size that is free."""
        ...

    def is_shape_inference_io(self, name: str) -> bool:
        """Whether its values decide shapes."""
        ...


class Runtime(Protocol):
    """Loads engines."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        """None if it cannot be loaded; why is in the log."""
        ...


_Builder: TypeAlias = Builder
_ComputeCapability: TypeAlias = ComputeCapability
_OnnxParser: TypeAlias = OnnxParser
_OnnxParserRefitter: TypeAlias = OnnxParserRefitter
_Refitter: TypeAlias = Refitter
_Runtime: TypeAlias = Runtime


class TensorRt(Protocol):
    """The module, `tensorrt` or `tensorrt_rtx`.

    Its constructors raise where no driver is, rather than return None.
    """

    __version__: str
    Builder: Callable[[ILogger], _Builder]
    BuilderFlag: BuilderFlag
    ComputeCapability: _ComputeCapability
    DynamicShapesKernelSpecializationStrategy: DynamicShapesKernelSpecializationStrategy
    EngineStat: EngineStat
    HardwareCompatibilityLevel: HardwareCompatibilityLevel
    ILogger: Any
    IOutputAllocator: Any
    MemoryPoolType: MemoryPoolType
    NetworkDefinitionCreationFlag: NetworkDefinitionCreationFlag
    OnnxParser: Callable[[INetworkDefinition, ILogger], _OnnxParser]
    OnnxParserRefitter: Callable[[_Refitter, ILogger], _OnnxParserRefitter]
    ProfilingVerbosity: ProfilingVerbosity
    Refitter: Callable[[ICudaEngine, ILogger], _Refitter]
    Runtime: Callable[[ILogger], _Runtime]
    RuntimePlatform: RuntimePlatform
    TensorIOMode: TensorIOMode
    TensorLocation: TensorLocation

    def init_libnvinfer_plugins(self, logger: ILogger, namespace: str) -> bool:
        """Make known the operators that full TensorRT has as plugins, before a graph is parsed or an engine is loaded.

        They are DFT, DeformConv, and ScatterElements with a reduction, among others.
        """
        ...
