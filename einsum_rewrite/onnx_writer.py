"""An engine that writes ONNX nodes, and rearranges constants at once instead of in every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from moe_export.einsum_rewrite.onnx_constants import MovedConstants
from moe_export.einsum_rewrite.onnx_numpy import NumpyEngine
from moe_export.einsum_rewrite.onnx_ops import run
from moe_export.einsum_rewrite.plan import Plan
from moe_export.graph_builder import Array, GraphBuilder

MOVES = {"Transpose", "Reshape", "Flatten", "Unsqueeze", "Squeeze", "Slice"}
"""What is done to a constant when the graph is written; arithmetic is left to the engine's own folding."""


class GraphEngine:
    """Writes the nodes for one site.

    Args:
        node: The Einsum; new nodes inherit its metadata and its name.
        opset: The opset of the graph.
        constants: Where constants come from and go to.
    """

    def __init__(self, node: ir.Node, opset: int, constants: MovedConstants) -> None:
        self.opset = opset
        self._constants = constants
        self._builder = GraphBuilder(constants, node.name or node.outputs[0].name or "einsum", node)

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """What was written, in order."""
        return self._builder.nodes

    def call(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Write a node; or, if it only rearranges a constant, rearrange it."""
        if op_type in MOVES:
            tensors = [self._constants.known(value) for value in inputs]
            if all(tensor is not None for tensor in tensors):
                return self._move(op_type, inputs, attributes)
        return self._builder.op(
            op_type, *inputs, **{key: _attribute(value) for key, value in attributes.items()}
        )

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A constant int64 vector."""
        return self._builder.ints(*values)

    def _move(self, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any]) -> ir.Value:
        numbers = [self._constants.known(value) for value in inputs[1:]]
        vectors = [tensor.numpy() for tensor in numbers if tensor is not None]
        how = (
            op_type,
            *(tuple(vector.tolist()) for vector in vectors),
            *((key, _attribute(value)) for key, value in sorted(attributes.items())),
        )

        def compute(array: Array) -> Array:
            return NumpyEngine(self.opset).call(op_type, array, *vectors, **attributes)

        return self._constants.moved(inputs[0], tuple(map(_hashable, how)), compute)


def _attribute(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _hashable(part: Any) -> Any:
    if isinstance(part, tuple):
        return tuple(map(_hashable, part))
    return tuple(part) if isinstance(part, list) else part


def write(
    plan: Plan,
    operands: Sequence[ir.Value],
    engine: GraphEngine,
    casts: tuple[ir.DataType, ir.DataType] | None = None,
) -> ir.Value:
    """Write a plan; the value of the result, which a node of this engine makes.

    Args:
        plan: A plan for these operands.
        operands: What the Einsum took.
        engine: Where the nodes go.
        casts: The type to compute in and the one to return to, where the operands' own will not do.
    """
    if casts is None:
        result: ir.Value = run(plan, operands, engine)
    else:
        wide = [engine.call("Cast", operand, to=int(casts[0])) for operand in operands]
        result = engine.call("Cast", run(plan, wide, engine), to=int(casts[1]))
    producer = result.producer()
    if producer is None or all(producer is not node for node in engine.nodes):
        result = engine.call("Identity", result)
    return result
