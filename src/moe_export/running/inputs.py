"""Inputs to run a graph on, at sizes that one names."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from moe_export.export.engines.profiles import complete_ranges, free_dims, input_shapes, shapes_at
from moe_export.running.engines import example_input
from moe_export.verify import TensorSpec
from moe_export.verify.specs import Array


def inputs_at(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Inputs of a graph, by name: seeded normal floats, and zeros for all else.

    Args:
        model: The graph.
        sizes: Of each of its free dimensions, by name.
    """
    ranges = complete_ranges(free_dims(model), {name: (size, size, size) for name, size in sizes.items()})
    shapes = shapes_at(input_shapes(model), ranges)
    dtypes = {str(value.name): value.dtype for value in model.graph.inputs}
    return {
        name: example_input(TensorSpec(name, (dtypes[name] or ir.DataType.FLOAT).numpy().name, best), {})
        for name, (_, best, _) in shapes.items()
    }
