"""Write mixed precision into a graph, given the nodes that stay float32: casts, converted weights, types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from moe_export.export.onnx.bodies import bodies
from moe_export.export.onnx.recipes import narrowed
from moe_export.export.weights.recipe import RecipeTensor
from moe_export.graph_builder import Constants

_NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
FLOAT = ir.DataType.FLOAT


def write_casts(model: ir.Model, wide: set[ir.Node], dtype: ir.DataType) -> int:
    """Let every node that is not wide compute in the narrow type.

    Args:
        model: The graph; it is changed.
        wide: Nodes of the main graph that stay float32, with all that is inside of them.
        dtype: The narrow type.

    Returns:
        The number of casts.
    """
    writer = _Writer(model.graph, wide, dtype)
    for node in list(model.graph):
        writer.fit(node)
    writer.fit_outputs()
    _drop_unused(model.graph)
    return writer.casts


class _Writer:
    def __init__(self, graph: ir.Graph, wide: set[ir.Node], dtype: ir.DataType) -> None:
        self.graph, self.wide, self.dtype = graph, wide, dtype
        self.casts = 0
        self._constants = Constants(graph)
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._narrow: set[ir.Value] = set()

    def fit(self, node: ir.Node) -> None:
        """Give a node inputs of its type, and its outputs their type."""
        if node.op_type == "Constant":
            return
        if node in self.wide:
            for index, value in enumerate(node.inputs):
                if value in self._narrow:
                    node.replace_input_with(index, self._as(value, FLOAT))
            for body in bodies(node):
                self._widen_captured(body)
            return
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype is FLOAT and value not in self._narrow:
                node.replace_input_with(index, self._as(value, self.dtype))
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(self.dtype))
        if node.op_type == "ConstantOfShape":
            self._fill(node)
        for value in node.outputs:
            if value.dtype is FLOAT:
                value.type = ir.TensorType(self.dtype)
                self._narrow.add(value)

    def fit_outputs(self) -> None:
        """The graph's outputs keep their type and their name."""
        for index, value in enumerate(self.graph.outputs):
            if value in self._narrow:
                name = value.name
                value.name = f"{name}.{self.dtype.name.lower()}"
                wide = self._cast(value, FLOAT)
                wide.name = name
                self.graph.outputs[index] = wide

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        key = (value, dtype)
        if key not in self._made:
            tensor = ir.convenience.get_const_tensor(value)
            self._made[key] = (
                self._cast(value, dtype) if tensor is None else self._weight(value, tensor, dtype)
            )
        return self._made[key]

    def _weight(self, value: ir.Value, tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}.{dtype.name.lower()}"
        if isinstance(tensor, RecipeTensor):
            return self._constants.add(RecipeTensor(narrowed(tensor.recipe, dtype), name), name)
        array = tensor.numpy().astype(np.float32)
        if dtype in _NUMPY:
            limit = float(ml_dtypes.finfo(_NUMPY[dtype]).max)  # type: ignore[no-untyped-call]
            # A mask of -3e38 means "never"; as -inf it would make NaN of a row that is masked altogether.
            array = np.where(np.isfinite(array), np.clip(array, -limit, limit), array).astype(_NUMPY[dtype])
        return self._constants.add(ir.Tensor(array, dtype=dtype), name)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"cast_{value.name}_{dtype.name.lower()}")
        made = node.outputs[0]
        made.name = f"{value.name}.as_{dtype.name.lower()}"
        made.type, made.shape = ir.TensorType(dtype), value.shape
        producer = value.producer()
        if producer is not None:
            node.metadata_props.update(producer.metadata_props)
            producer.append(node)
        else:
            self.graph.insert_before(self.graph[0], node)
        self.casts += 1
        return made

    def _fill(self, node: ir.Node) -> None:
        attribute = node.attributes.get("value")
        array = attribute.as_tensor().numpy() if attribute is not None else np.zeros(1, np.float32)
        if array.dtype == np.float32:
            tensor = ir.Tensor(array.astype(_NUMPY[self.dtype]), dtype=self.dtype)
            node.attributes["value"] = ir.AttrTensor("value", tensor)

    def _widen_captured(self, body: ir.Graph) -> None:
        """A body reads values of the graph around it by their names: those that are narrow now, cast."""
        for node in body.all_nodes():
            for index, value in enumerate(node.inputs):
                if value in self._narrow:
                    node.replace_input_with(index, self._as(value, FLOAT))
        for index, value in enumerate(body.outputs):
            if value in self._narrow:
                body.outputs[index] = self._as(value, FLOAT)


def _drop_unused(graph: ir.Graph) -> None:
    """Weights that only narrow nodes read are in the file once, converted."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
    for node in list(graph):
        if node.op_type == "Constant" and not any(
            value.uses() or value.is_graph_output() for value in node.outputs
        ):
            graph.remove(node)
