"""Inputs to run a graph on, at given sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from moe_export.export.engines.profiles import input_shapes, shapes_at
from moe_export.export.engines.shape_inputs import complete_profile, value_names
from moe_export.running.engines import example_input
from moe_export.verify import TensorSpec
from moe_export.verify.specs import Array


def inputs_at(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Inputs of a graph, by name: standard normal floats (seed 0), and zeros for all other types.

    Args:
        model: The graph.
        sizes: Sizes of its free dimensions, and values of inputs that can decide shapes, by name; the default is 1 for
            `batch`, 128 for any other dimension, and 0 for a value.

    Raises:
        UsageError: There is no such dimension, or the graph is not right at that size.
    """
    ranges = complete_profile(model, {name: (size, size, size) for name, size in sizes.items()})
    shapes = shapes_at(input_shapes(model), ranges)
    dtypes = {str(value.name): value.dtype for value in model.graph.inputs}
    arrays = {
        name: example_input(TensorSpec(name, (dtypes[name] or ir.DataType.FLOAT).numpy().name, best), {})
        for name, (_, best, _) in shapes.items()
    }
    for name, called in value_names(model).items():
        values = [ranges[value].best if value in ranges else 0 for value in called]
        arrays[name] = np.array(values, arrays[name].dtype).reshape(arrays[name].shape)
    return arrays
