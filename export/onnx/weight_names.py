"""Initializers by names that a reader knows: those of the model's state_dict, and of what they hold.

head.weight                 a weight, by its key in `model.state_dict()`
head.weight.transpose       what the exporter or a lowering made of it
experts.up.3.transpose      one expert's part of a stack
constant.1e-05, constant.2x16    a number of the model's code, and a tensor of such
experts_0.ints_m1           a number that a lowering needs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

import onnx_ir as ir

from moe_export.export.onnx.naming import fresh_name

_FEW = 4
_SHAPES = {"Constant", "Shape", "Size"}  # nodes that read no values of a weight


def name_derived(graph: ir.Graph) -> None:
    """Name what is about to be computed of weights, and of nothing but weights and constants: it keeps that name.

    Args:
        graph: As torch's exporter made it, before constants are folded; its initializers are still the model's own.
    """
    weights = {value: str(value.name) for value in graph.initializers.values() if "." in str(value.name)}
    constants = {value for value in graph.initializers.values() if value not in weights}
    used = Counter(str(value.name) for value in (*graph.inputs, *graph.outputs, *weights, *constants))
    for node in graph:  # in the order in which they are computed
        taken = [value for value in node.inputs if value is not None]
        if len(node.outputs) != 1 or node.outputs[0].is_graph_output() or node.domain:
            continue
        if any(value not in weights and value not in constants for value in taken):
            continue
        first = next((weights[value] for value in taken if value in weights), None)
        if first is None or node.op_type in _SHAPES:
            constants.add(node.outputs[0])
            continue
        name = fresh_name(f"{first}.{node.op_type.lower()}", used)
        node.outputs[0].name = weights[node.outputs[0]] = name


def name_weights(graph: ir.Graph, scope: str) -> None:
    """Give weights the names of the state_dict, and call constants after what they hold.

    Args:
        graph: Changed in place.
        scope: The name that the model has as a module, which its weights begin with.
    """
    values = list(graph.initializers.values())
    used = Counter(str(value.name) for value in (*graph.inputs, *graph.outputs, *values))
    for value in values:
        name = str(value.name)
        if name.startswith(f"{scope}."):
            value.name = fresh_name(name.removeprefix(f"{scope}."), used)
        elif "." not in name:  # whoever else named it had something to say
            value.name = fresh_name(f"constant.{_content(value)}", used)


def name_constants(graph: ir.Graph, known: Container[str]) -> None:
    """Call constants after what they hold, if an optimiser made them: `_v_443`.

    Args:
        graph: Changed in place.
        known: Names that are no optimiser's.
    """
    values = list(graph.initializers.values())
    used = Counter(str(value.name) for value in (*graph.inputs, *graph.outputs, *values))
    for value in values:
        if value.name not in known:
            value.name = fresh_name(f"constant.{_content(value)}", used)


def _content(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None or tensor.size > _FEW:
        return "x".join(map(str, value.shape or ())) or "tensor"
    return "_".join(
        f"{number:g}" if isinstance(number, float) else str(number)
        for number in tensor.numpy().ravel().tolist()
    )
