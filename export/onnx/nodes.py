"""`Nodes`: write ONNX nodes in front of a given one, as one writes calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

_SMALL = 2**20  # elements of a weight that is reshaped here rather than in the graph


class Nodes:
    """Writes nodes in front of `anchor`, with its provenance; names begin with `prefix`.

    Example:
        nodes = Nodes(graph, end, "loop_0")
        y = nodes("MatMul", a, nodes("Unsqueeze", b, nodes.ints(2)))
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node, prefix: str) -> None:
        self.graph, self.anchor, self.prefix = graph, anchor, prefix
        self._constants: dict[Any, ir.Value] = {}
        self._count = 0

    def __call__(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Write a node with one output, whose type is that of its first input."""
        return self.parts(op, 1, *inputs, **attributes)[0]

    def parts(
        self, op: str, count: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Write a node with several outputs."""
        node = ir.node(op, inputs, attributes=attributes, num_outputs=count, domain=domain)
        node.metadata_props.update(self.anchor.metadata_props)
        first = next((value for value in inputs if value is not None), None)
        for output in node.outputs:
            output.name = self._name(op.lower())
            output.type = first.type if first is not None else None
        self.graph.insert_before(self.anchor, node)
        return node.outputs

    def copy(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
        """Write a node again with other inputs."""
        new = ir.node(
            node.op_type, inputs, attributes=dict(node.attributes), num_outputs=len(node.outputs),
            domain=node.domain,
        )  # fmt: skip
        new.metadata_props.update(node.metadata_props)
        for old, output in zip(node.outputs, new.outputs, strict=True):
            output.name, output.type = self._name(node.op_type.lower()), old.type
        self.graph.insert_before(self.anchor, new)
        return new.outputs

    def ints(self, *numbers: int) -> ir.Value:
        """A constant list of integers."""
        return self.constant(np.array(numbers, np.int64))

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """A constant, written once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            value = ir.Value(name=self._name("constant"), const_value=ir.Tensor(array))
            value.shape = ir.Shape(array.shape)
            value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def unsqueezed(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """With axes of size 1 at these places of the result; a small constant becomes another constant."""
        if not axes:
            return value
        tensor = value.const_value
        if (
            tensor is not None
            and tensor.size <= _SMALL
            and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        ):
            return self.constant(np.expand_dims(tensor.numpy(), tuple(axes)))
        return self("Unsqueeze", value, self.ints(*axes))

    def transposed(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """With its axes in another order."""
        if list(order) == list(range(len(order))):
            return value
        return self("Transpose", value, perm=list(order))

    def flipped(self, value: ir.Value, axis: int) -> ir.Value:
        """Last first along an axis."""
        ends = self.ints(-(2**63) + 1)
        return self("Slice", value, self.ints(-1), ends, self.ints(axis), self.ints(-1))

    def filled(self, value: ir.Value, axis: int, rank: int, filling: ir.Value) -> ir.Value:
        """With `filling` zeros behind an axis of a value of this rank."""
        key = ("filling", rank, axis, filling.name)
        if key not in self._constants:
            ahead, behind = [0] * (rank + axis), [0] * (rank - 1 - axis)
            parts = [self.ints(*ahead), filling, *([self.ints(*behind)] if behind else [])]
            self._constants[key] = self("Concat", *parts, axis=0)
        return self("Pad", value, self._constants[key])

    def scalar(self, number: int) -> ir.Value:
        """A constant integer."""
        return self.constant(np.array(number, np.int64))

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{self.prefix}_{kind}_{self._count}"
