"""Inputs whose values decide shapes: an engine needs the least, best and greatest of each value, as of each size.

    k int64[]   ─▶ Range     k = 1:8:64
    s int64[2]  ─▶ Reshape   s_0 = 1:4:16, s_1 = 6

Only the parser knows which inputs are of this kind. A few integers can be, in a shape that is fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import onnx_ir as ir

from moe_export.errors import UsageError
from moe_export.export.engines.profiles import Range, Ranges, complete_ranges, free_dims, input_shapes
from moe_export.tensorrt_api import INetworkDefinition, IOptimizationProfile

_MOST = 16  # values of one input: what pads 8 axes, TensorRT's most, on both sides
_INTEGERS = {ir.DataType.INT32, ir.DataType.INT64}


def value_names(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """The inputs that can decide shapes, and what their values are called: `k`, or `s_0`, `s_1` for two."""
    dtypes = {str(value.name): value.dtype for value in model.graph.inputs}
    found = {}
    for name, shape in input_shapes(model).items():
        sizes = [size for size in shape if isinstance(size, int)]
        count = prod(sizes)
        if dtypes[name] in _INTEGERS and len(sizes) == len(shape) and 0 < count <= _MOST:
            found[name] = (name,) if count == 1 else tuple(f"{name}_{place}" for place in range(count))
    return found


def range_names(model: ir.Model) -> tuple[str, ...]:
    """What `--range` may name: dimensions, and the values of inputs that can decide shapes."""
    values = (name for names in value_names(model).values() for name in names)
    return tuple(dict.fromkeys([*(dim.name for dim in free_dims(model)), *values]))


def complete_profile(model: ir.Model, ranges: Ranges) -> dict[str, Range]:
    """A range for every free dimension, and for the values that one was asked for.

    Raises:
        UsageError: There is no such dimension or value; a range goes beyond what the graph says it is right for.
    """
    dims = free_dims(model)
    values = set(range_names(model)) - {dim.name for dim in dims}
    sizes = {name: found for name, found in ranges.items() if name not in values}
    asked = {name: found for name, found in ranges.items() if name in values}
    found = {name: one if isinstance(one, Range) else Range(*one) for name, one in asked.items()}
    return complete_ranges(dims, sizes) | found


def set_values(
    profile: IOptimizationProfile,
    network: INetworkDefinition,
    ranges: Mapping[str, Range],
    names: Mapping[str, Sequence[str]],
) -> None:
    """Give a profile the values of the inputs that decide shapes.

    Args:
        profile: The profile.
        network: What the parser made of the graph.
        ranges: Ranges by dimension and value.
        names: What the values of an input are called (`value_names`).

    Raises:
        UsageError: A value has no range, or one has that decides nothing.
    """
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        called = names.get(tensor.name, ())
        given = [ranges[name] for name in called if name in ranges]
        if tensor.is_shape_tensor:
            missing = [name for name in called if name not in ranges]
            if missing or not called:
                raise UsageError(
                    f"input {tensor.name} decides shapes in the graph (Reshape, Range, ...), and an engine has to know "
                    "which values it may have",
                    hint=f"--range {','.join(f'{name}=MIN:OPT:MAX' for name in missing)}"
                    if missing
                    else f"up to {_MOST} integers can be given; make it a constant of the graph",
                )
            profile.set_shape_input(
                tensor.name,
                [found.minimum for found in given],
                [found.best for found in given],
                [found.maximum for found in given],
            )
        elif given and not set(called) & {str(size) for size in tensor.shape}:
            raise UsageError(
                f"input {tensor.name} decides no shape in the graph: an engine takes any value of it",
                hint=f"leave out --range {called[0]}",
            )
