"""TensorRT without a GPU: classes that return False or None, and raise, as the manual says, on the host's memory.

`module(...)` stands for the module. Names of steps in `fails` make these fail as TensorRT has them fail: `"Runtime"`
raises, `"create_execution_context"` returns None, `"set_input_shape"` returns False.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace

import numpy as np
import torch

from moe_export.verify.specs import numpy_dtype

BYTES = {"FLOAT": "float32", "INT32": "int32", "INT64": "int64", "FP8": "float8_e4m3fn", "BOOL": "bool"}


def names(title, *members):
    """An enumeration of TensorRT's."""
    return Enum(title, list(members))


Location = names("TensorLocation", "DEVICE", "HOST")
Mode = names("TensorIOMode", "INPUT", "OUTPUT")
DataType = names("DataType", *BYTES, "HALF", "BF16", "INT4", "FP4", "INT8", "UINT8", "E8M0")


@dataclass
class Tensor:
    """An input or output: its type, its shape with -1, three shapes or values of its profile, and whether it is an
    input whose values decide shapes, or an output that is computed with them."""

    dtype: str
    shape: tuple
    profile: tuple = ()
    on_host: bool = False


@dataclass
class Product:
    """What the doubles of one TensorRT share.

    Attributes:
        inputs, outputs: By name.
        compute: Arrays to arrays, by name.
        fails: Steps that fail.
        stripped: Bytes of weights that the engine lacks.
        told: What was called, with what matters of it.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    compute: Callable = dict
    fails: frozenset = frozenset()
    stripped: int = -1
    told: list = field(default_factory=list)

    @property
    def every(self):
        return {**self.inputs, **self.outputs}


class Log:
    """A logger of ours."""

    def __init__(self):
        self.messages = []


def bytes_at(address, dtype, shape):
    kind = numpy_dtype(BYTES[dtype])
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer(ctypes.string_at(address, size), kind).reshape(shape)


def module(product: Product, name="tensorrt"):
    """The module, with what is used to run engines."""

    def checked(step, log, value, failed):
        """What a step returns, or what it returns when it fails."""
        product.told.append(step)
        if step in product.fails:
            log.messages.append((1, f"{step} was told to fail"))
            return failed
        return value

    class Runtime:
        def __init__(self, logger):
            if "Runtime" in product.fails:
                logger.messages.append((1, "CUDA initialization failure with error: 35"))
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self.log, self.engine_host_code_allowed = logger, False

        def deserialize_cuda_engine(self, serialized_engine):
            product.told.append(("host code", self.engine_host_code_allowed))
            return checked("deserialize_cuda_engine", self.log, ICudaEngine(self.log), None)

    class ICudaEngine:
        def __init__(self, log):
            self.log = log
            self.num_io_tensors = len(product.every)

        def get_engine_stat(self, stat):
            return product.stripped

        def create_runtime_config(self):
            return checked("create_runtime_config", self.log, IRuntimeConfig(self.log), None)

        def create_execution_context(self, runtime_config):
            product.told.append(("config", runtime_config))
            return checked("create_execution_context", self.log, IExecutionContext(self.log), None)

        def get_tensor_name(self, index):
            return list(product.every)[index]

        def get_tensor_mode(self, name):
            return Mode.INPUT if name in product.inputs else Mode.OUTPUT

        def get_tensor_dtype(self, name):
            return DataType[product.every[name].dtype]

        def get_tensor_shape(self, name):
            return product.every[name].shape

        def get_tensor_location(self, name):
            return Location.HOST if product.every[name].on_host else Location.DEVICE

        def is_shape_inference_io(self, name):
            return product.every[name].on_host

        def get_tensor_profile_shape(self, name, profile_index):
            found = product.inputs[name]
            return [found.shape] * 3 if found.on_host else found.profile

        def get_tensor_profile_values(self, profile, name, /):
            assert isinstance(profile, int)
            assert product.inputs[name].on_host, "not an input shape binding"
            return product.inputs[name].profile

    class IRuntimeCache:
        def __init__(self):
            self.kernels = b""

        def deserialize(self, blob):
            if not blob.startswith(b"kernels of this GPU"):
                return False
            self.kernels = blob
            product.told.append(("kernels", blob))
            return True

        def serialize(self):
            return None if "serialize" in product.fails else b"kernels of this GPU" + self.kernels[19:] + b"."

    class IRuntimeConfig:
        def __init__(self, log):
            self.log, self.cache = log, None
            self.dynamic_shapes_kernel_specialization_strategy = "LAZY"

        if name == "tensorrt-rtx":

            def create_runtime_cache(self):
                return checked("create_runtime_cache", self.log, IRuntimeCache(), None)

            def set_runtime_cache(self, cache):
                self.cache = cache
                return checked("set_runtime_cache", self.log, True, False)

    class IExecutionContext:
        def __init__(self, log):
            self.log = log
            self.shapes, self.addresses, self.allocators, self.computed = {}, {}, {}, {}

        def set_optimization_profile_async(self, profile_index, stream_handle):
            return checked("set_optimization_profile_async", self.log, profile_index == 0, False)

        def set_input_shape(self, name, shape):
            self.shapes[name] = shape
            return checked("set_input_shape", self.log, name in product.inputs, False)

        def set_tensor_address(self, name, memory):
            self.addresses[name] = memory
            return checked("set_tensor_address", self.log, name in product.every, False)

        def set_output_allocator(self, name, output_allocator):
            assert not product.outputs[name].on_host
            self.allocators[name] = output_allocator
            return checked("set_output_allocator", self.log, True, False)

        def get_max_output_size(self, name):
            return checked("get_max_output_size", self.log, 4096, -1)

        def get_tensor_shape(self, name):
            return self.computed[name].shape

        def execute_async_v3(self, stream_handle):
            for name in product.inputs:
                if not self.addresses.get(name):
                    self.log.messages.append((1, f"the address of input {name} is not set"))
                    return False
            given = {
                name: bytes_at(self.addresses[name], found.dtype, self.shapes[name])
                for name, found in product.inputs.items()
            }
            self.computed = product.compute(given)
            for name, array in self.computed.items():
                address = self.addresses.get(name)
                if name in self.allocators:
                    memory = self.allocators[name].reallocate_output_async(
                        name, 0, max(array.nbytes, 1), 256, 0
                    )
                    if not memory:
                        self.log.messages.append((1, f"no memory for output {name}"))
                        return False
                    address = memory
                    self.allocators[name].notify_shape(name, array.shape)
                ctypes.memmove(address, array.tobytes(), array.nbytes)
            return checked("execute_async_v3", self.log, True, False)

    class Refitter:
        def __init__(self, engine, logger):
            self.log = logger

        def get_missing_weights(self):
            return ["layer.weight"] if "refit_cuda_engine" in product.fails else []

        def refit_cuda_engine(self):
            product.stripped = -1
            return checked("refit_cuda_engine", self.log, True, False)

    class OnnxParserRefitter:
        def __init__(self, refitter, logger):
            self.log, self.num_errors = logger, int("refit_from_file" in product.fails)

        def get_error(self, index):
            return SimpleNamespace(desc=lambda: "no initializer of that name")

        def refit_from_file(self, model):
            product.told.append(("weights of", model))
            return checked("refit_from_file", self.log, True, False)

    class IOutputAllocator:
        pass

    found = {kind.__name__: kind for kind in (Runtime, Refitter, OnnxParserRefitter, IOutputAllocator)}
    strategies = SimpleNamespace(EAGER="EAGER")
    extra = {"DynamicShapesKernelSpecializationStrategy": strategies} if name == "tensorrt-rtx" else {}
    doubles = (ICudaEngine, IRuntimeConfig, IRuntimeCache, IExecutionContext)
    return SimpleNamespace(
        **found,
        **extra,
        TensorLocation=Location,
        TensorIOMode=Mode,
        EngineStat=SimpleNamespace(STRIPPED_WEIGHTS_SIZE="stripped"),
        init_libnvinfer_plugins=lambda logger, namespace: checked("plugins", logger, True, False),
        doubles=(*found.values(), *doubles),
    )


@dataclass
class Backend:
    """A TensorRT as runners take it."""

    name: str
    trt: object
    version: str = "11.4.0.106"

    def log(self):
        return Log()


class HostCuda:
    """`Cuda` on the host's memory."""

    stream = 7

    def memory(self, count):
        return torch.empty(count, dtype=torch.uint8)

    def copy(self, raw):
        return torch.from_numpy(raw.copy()) if raw.size else self.memory(1)

    def begin(self):
        """Nothing is under way."""

    def wait(self):
        """Nothing is under way."""
