"""What an engine's profile takes: inputs and outputs, sizes of free dimensions, values of inputs that decide shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_export.errors import UsageError
from moe_export.tensorrt_api import ICudaEngine, TensorRt
from moe_export.verify.runners.tensorrt_buffers import dtype_of
from moe_export.verify.specs import Array, DimRange, TensorSpec, describe


@dataclass(frozen=True, eq=False)
class Limits:
    """The values of an input that decides shapes, each an array of the input's shape.

    Attributes:
        low, best, high: The least, those that the engine is fastest at, and the greatest.
    """

    low: Array
    best: Array
    high: Array


@dataclass(frozen=True, eq=False)
class EngineProfile:
    """What an engine takes in one of its profiles.

    Attributes:
        inputs: The inputs; a free axis that has no name is called `<input>_dim<axis>`.
        outputs: The outputs.
        dims: The sizes of each free dimension; `traced` is the one that the engine is fastest at.
        values: The values of inputs that decide shapes, by input.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[DimRange, ...]
    values: Mapping[str, Limits]

    def check(self, inputs: Mapping[str, Array], where: str) -> None:
        """Refuse inputs that the profile does not take.

        Raises:
            UsageError: A name, dtype, size or value that it does not take; it says what it takes.
        """
        allowed = {dim.name: dim for dim in self.dims}
        problems = [text for spec in self.inputs for text in self._problems(spec, inputs, allowed)]
        if problems:
            raise UsageError("; ".join(problems), where=where, hint="build it with other sizes: --range")

    def _problems(
        self, spec: TensorSpec, inputs: Mapping[str, Array], allowed: Mapping[str, DimRange]
    ) -> Iterator[str]:
        if spec.name not in inputs:
            yield f"input {spec.name} is missing"
            return
        array = np.asarray(inputs[spec.name])
        if array.dtype.name != spec.dtype or array.ndim != len(spec.shape):
            yield f"input {spec.name} is {describe(array)}"
            return
        for want, got in zip(spec.shape, array.shape, strict=True):
            if isinstance(want, int) and want != got:
                yield f"input {spec.name} is {describe(array)}"
            elif isinstance(want, str) and allowed[want].clamp(got) != got:
                limits = f"{allowed[want].minimum} to {allowed[want].maximum}"
                yield f"input {spec.name} has {want} = {got}, the engine's profile takes {limits}"
        limit = self.values.get(spec.name)
        if limit is not None and not bool(np.all((limit.low <= array) & (array <= limit.high))):
            yield (
                f"input {spec.name} is {array.tolist()}, the engine's profile takes {limit.low.tolist()} to "
                f"{limit.high.tolist()}"
            )

    @property
    def limits(self) -> dict[str, tuple[Array, Array]]:
        """The least and greatest values of inputs that decide shapes."""
        return {name: (found.low, found.high) for name, found in self.values.items()}


def profile_of(
    engine: ICudaEngine, trt: TensorRt, profile: int, names: Mapping[str, Sequence[int | str]]
) -> EngineProfile:
    """What an engine takes in a profile.

    Args:
        engine: The engine.
        trt: Its TensorRT.
        profile: The profile's number.
        names: Names of free axes by input.

    Raises:
        UsageError: An input or output has a type that is not known here.
    """
    every = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    taken = [name for name in every if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    inputs = tuple(_spec(engine, name, names) for name in taken)
    outputs = tuple(_spec(engine, name, names) for name in every if name not in taken)
    dims = (dim for spec in inputs for dim in _ranges(engine, spec, profile))
    values = {
        spec.name: _limits(engine, spec, profile) for spec in inputs if _decides_shapes(engine, trt, spec)
    }
    return EngineProfile(inputs, outputs, tuple({dim.name: dim for dim in dims}.values()), values)


def _spec(engine: ICudaEngine, name: str, names: Mapping[str, Sequence[int | str]]) -> TensorSpec:
    called = names.get(name, ())
    shape = tuple(
        int(size) if size >= 0 else str(called[axis]) if axis < len(called) else f"{name}_dim{axis}"
        for axis, size in enumerate(engine.get_tensor_shape(name))
    )
    return TensorSpec(name, dtype_of(name, engine.get_tensor_dtype(name).name), shape)


def _ranges(engine: ICudaEngine, spec: TensorSpec, profile: int) -> list[DimRange]:
    low, best, high = engine.get_tensor_profile_shape(spec.name, profile)
    return [
        DimRange(size, best[axis], low[axis], high[axis])
        for axis, size in enumerate(spec.shape)
        if isinstance(size, str)
    ]


def _decides_shapes(engine: ICudaEngine, trt: TensorRt, spec: TensorSpec) -> bool:
    """Whether a profile has values of an input: it is read on the host, to compute shapes."""
    on_host = engine.get_tensor_location(spec.name) == trt.TensorLocation.HOST
    return on_host and engine.is_shape_inference_io(spec.name)


def _limits(engine: ICudaEngine, spec: TensorSpec, profile: int) -> Limits:
    low, best, high = (
        np.array(values, spec.dtype).reshape([int(size) for size in spec.shape])
        for values in engine.get_tensor_profile_values(profile, spec.name)
    )
    return Limits(low, best, high)
