"""Where the weights of a graph come from: lazy weights, or much of a live module, become recipes."""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from moe_export.errors import Code, NotExportableError
from moe_export.export.onnx.bodies import initializers
from moe_export.export.weights.lazy import SMALL, is_whole, lazy_weight_of
from moe_export.export.weights.recipe import Converted, Held, Recipe, RecipeTensor, recipe_of

STREAMED = 2**31 - 2**24
"""Bytes of weights from which those of a live module are streamed: protobuf cannot hold 2 GiB."""


def is_streamed(program: ExportedProgram) -> bool:
    """Whether a program's weights are written from where they are, not from a graph in memory."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if any(lazy_weight_of(tensor) is not None for tensor in tensors):
        return True
    return sum(int(tensor.nbytes) for tensor in tensors if tensor.layout is torch.strided) > STREAMED


def place_recipes(model: ir.Model) -> None:
    """Give every large initializer of a model, as torch's exporter made it, a recipe."""
    for value in initializers(model):
        tensor = value.const_value
        raw = getattr(tensor, "raw", None)
        if (
            tensor is None
            or not isinstance(raw, torch.Tensor)
            or math.prod(raw.shape) * raw.itemsize <= SMALL
        ):
            continue
        value.const_value = RecipeTensor(_recipe(raw, tensor), value.name)


def _recipe(raw: torch.Tensor, tensor: ir.TensorProtocol) -> Recipe:
    item = lazy_weight_of(raw)
    if item is None or (item.full and not is_whole(raw, item)):
        return Held(tensor.numpy, tensor.dtype, tuple(raw.shape))
    if not is_whole(raw, item):
        raise NotExportableError(
            f"a view of {item.name} is a constant of the graph, and its values are in a file",
            code=Code.WEIGHT_VALUES,
            hint="make the view in forward, or load the weights: --memory takes more bytes than they have",
        )
    return item.recipe


def has_recipes(model: ir.Model) -> bool:
    """Whether a weight of a model is a recipe."""
    return any(recipe_of(value) is not None for value in initializers(model))


def narrowed(recipe: Recipe, dtype: ir.DataType) -> Recipe:
    """A weight in half precision; what is finite stays finite."""
    return Converted(recipe, dtype, finite=dtype != ir.DataType.FLOAT)


def without_weights(model: ir.Model) -> onnx.ModelProto:
    """The graph with its large weights as inputs: all that a checker looks at, and none of their bytes."""
    copy = model.clone()
    for value in list(copy.graph.initializers.values()):
        tensor = value.const_value
        if isinstance(tensor, (RecipeTensor, ir.ExternalTensor)):
            bare = ir.Value(name=value.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
            value.replace_all_uses_with(bare)
            del copy.graph.initializers[str(value.name)]
            copy.graph.inputs.append(bare)
    return ir.to_proto(copy)
