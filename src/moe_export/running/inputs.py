"""Inputs to run a graph on, at given sizes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from moe_export.export.engines.profiles import complete_ranges, free_dims, input_shapes, shapes_at
from moe_export.running.engines import example_input
from moe_export.verify import TensorSpec
from moe_export.verify.specs import Array


def inputs_at(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Inputs of a graph, by name: standard normal floats (seed 0), and zeros for all other types.

    Args:
        model: The graph.
        sizes: Sizes of its free dimensions, by name; the default is 1 for `batch` and 128 for any other.

    Raises:
        UsageError: There is no such dimension, or the graph is not right at that size.
    """
    ranges = complete_ranges(free_dims(model), {name: (size, size, size) for name, size in sizes.items()})
    shapes = shapes_at(input_shapes(model), ranges)
    dtypes = {str(value.name): value.dtype for value in model.graph.inputs}
    return {
        name: example_input(TensorSpec(name, (dtypes[name] or ir.DataType.FLOAT).numpy().name, best), {})
        for name, (_, best, _) in shapes.items()
    }
