"""A graph cut where values leave its blocks: the inputs, outputs and weights of each part.

A node belongs to the block whose module path is in its metadata (`provenance`). Nodes of no block belong to the part
that needs them first; those before a block are a part of their own, so that a wrong embedding is not blamed on the
first layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from moe_export.export.onnx.bodies import initializers
from moe_export.export.onnx.functions import without_functions
from moe_export.export.onnx.provenance import MODULE
from moe_export.export.onnx.recipes import without_weights
from moe_export.export.weights.recipe import Recipe, Stored, recipe_of
from moe_export.external_data import check_external_data
from moe_export.verify import Array, TensorSpec
from moe_export.verify.bodies import reads
from moe_export.verify.runners.onnxruntime_runner import specs_of


@dataclass(frozen=True)
class Part:
    """Some nodes of a graph.

    Attributes:
        name: `layers.0`, or `before layers.0`; "" for what comes after the last block.
        block: The block that the part is, or comes before; "" for none.
        nodes: In the graph's order.
        takes: Names of the part's inputs: values of other parts, and inputs of the graph.
        gives: Names of the part's outputs: values for other parts, and outputs of the graph.
    """

    name: str
    block: str
    nodes: tuple[onnx.NodeProto, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]


class CutGraph:
    """A graph and its blocks.

    Args:
        path: The graph's file.
        blocks: Module paths, in the order in which they are called.
        folder: The folder of the files that the graph refers to, if the graph is temporarily elsewhere.

    Attributes:
        weights: Where each weight outside the graph's file is stored, by name.
        outputs: The names of the graph's outputs.
        covered: Indices of the nodes in the parts made so far.

    Raises:
        UsageError: The graph's data files are not those that it was written with.
    """

    def __init__(self, path: Path, blocks: Sequence[str], folder: Path | None = None) -> None:
        if folder is None:
            check_external_data(path)
        model = without_functions(ir.load(path))
        self.weights = _weights(model, path, folder)
        self._proto = without_weights(model)
        self._blocks = tuple(blocks)
        self._large = set(self.weights)
        self._inputs = {value.name for value in self._proto.graph.input} - self._large
        self._small = {tensor.name: tensor for tensor in self._proto.graph.initializer}
        self._nodes = list(self._proto.graph.node)
        self._owner = [self._block_of(node) for node in self._nodes]
        self._maker = {name: at for at, node in enumerate(self._nodes) for name in node.output if name}
        self._reads = [tuple(reads(node)) for node in self._nodes]
        self._types = {
            value.name: value.type for value in (*self._proto.graph.value_info, *self._proto.graph.output)
        }
        self.outputs = tuple(value.name for value in self._proto.graph.output)
        self.covered: set[int] = set()

    @property
    def count(self) -> int:
        """The number of nodes of the graph."""
        return len(self._nodes)

    def parts(self) -> Iterator[Part]:
        """The parts in the order in which they can be run."""
        known = set(self._inputs)
        for block in self._blocks:
            gives = self._leaving(block)
            inside = [at for at, owner in enumerate(self._owner) if owner == block]
            if not inside:
                yield Part(block, block, (), (), ())
                continue
            entering = {
                name
                for at in inside
                for name in self._reads[at]
                if name in self._maker and self._owner[self._maker[name]] != block and name not in known
            }
            if entering:
                yield self._part(f"before {block}", block, sorted(entering), known)
                known |= entering
            yield self._part(block, block, gives, known)
            known |= set(gives)
        rest = [name for name in self.outputs if name not in known]
        if rest:
            yield self._part("", "", rest, known)

    def specs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, without its weights."""
        return specs_of([value for value in self._proto.graph.input if value.name in self._inputs])

    def model_of(self, part: Part, values: Mapping[str, Array]) -> onnx.ModelProto:
        """A part as a model of its own, with the weights outside the graph's file as inputs.

        Args:
            part: A part of this graph.
            values: Values by name, among them the part's inputs, whose dtypes and ranks are taken from here.
        """
        needed = {name for node in part.nodes for name in reads(node)}
        weights = sorted(needed & self._large)
        inputs = [
            *(_input_like(name, values[name]) for name in part.takes),
            *(value for value in self._proto.graph.input if value.name in weights),
        ]
        outputs = [self._value(name) for name in part.gives]
        graph = helper.make_graph(
            part.nodes,
            part.name or "after the blocks",
            inputs,
            outputs,
            [tensor for name, tensor in self._small.items() if name in needed],
            value_info=[
                helper.make_value_info(name, self._types[name])
                for node in part.nodes
                for name in node.output
                if name in self._types and name not in part.gives
            ],
        )
        model = helper.make_model(
            graph, opset_imports=self._proto.opset_import, ir_version=self._proto.ir_version
        )
        model.metadata_props.extend(self._proto.metadata_props)
        return model

    def weights_of(self, part: Part) -> dict[str, Recipe]:
        """The weights outside the graph's file that a part reads, by name."""
        needed = {name for node in part.nodes for name in reads(node)}
        return {name: recipe for name, recipe in self.weights.items() if name in needed}

    def _block_of(self, node: onnx.NodeProto) -> str:
        module = next((entry.value for entry in node.metadata_props if entry.key == MODULE), "")
        found = [block for block in self._blocks if module == block or module.startswith(f"{block}.")]
        return max(found, key=len, default="")

    def _leaving(self, block: str) -> list[str]:
        """Values of a block that are read outside it or are outputs of the graph."""
        found = [
            name
            for at, owner in enumerate(self._owner)
            if owner != block
            for name in self._reads[at]
            if name in self._maker and self._owner[self._maker[name]] == block
        ]
        own = [
            name for name in self.outputs if name in self._maker and self._owner[self._maker[name]] == block
        ]
        return list(dict.fromkeys([*found, *own]))

    def _part(self, name: str, block: str, gives: Sequence[str], known: set[str]) -> Part:
        """The part that computes the values in `gives` from values in `known`."""
        needed: set[int] = set()
        takes: dict[str, None] = {}
        stack = list(gives)
        while stack:
            value = stack.pop()
            at = self._maker.get(value)
            if value in known and (value not in gives):
                takes[value] = None
            elif at is not None and at not in needed:
                needed.add(at)
                stack += self._reads[at]
        self.covered |= needed
        return Part(name, block, tuple(self._nodes[at] for at in sorted(needed)), tuple(takes), tuple(gives))

    def _value(self, name: str) -> onnx.ValueInfoProto:
        value = onnx.ValueInfoProto(name=name)
        if name in self._types:
            value.type.CopyFrom(self._types[name])
        return value


def _input_like(name: str, array: Array) -> onnx.ValueInfoProto:
    """An input with the dtype and rank of an array, and free sizes."""
    return helper.make_tensor_value_info(name, ir.DataType.from_numpy(array.dtype), [None] * array.ndim)


def _weights(model: ir.Model, path: Path, folder: Path | None) -> Mapping[str, Recipe]:
    """Where each weight outside the graph's file is stored, by name."""
    found: dict[str, Recipe] = {}
    for value in initializers(model):
        tensor, recipe = value.const_value, recipe_of(value)
        if recipe is not None:
            found[str(value.name)] = recipe
        elif isinstance(tensor, ir.ExternalTensor):
            beside = path.parent / str(tensor.location)
            file = beside if beside.exists() or folder is None else folder / str(tensor.location)
            shape = tuple(tensor.shape.numpy())
            found[str(value.name)] = Stored(file, tensor.offset or 0, tensor.dtype, shape)
    return found


def nearest(value: Array, leaves: Sequence[Array]) -> tuple[int, float] | None:
    """The tensor of a module that a value is most likely to be.

    Args:
        value: A value of the graph.
        leaves: The tensors that the module took or returned.

    Returns:
        The tensor's index and its mean absolute difference from the value; None if no tensor has the value's dtype and
        number of elements. A tensor of another shape counts only where none has the value's shape.
    """
    best: tuple[int, float] | None = None
    for index, leaf in enumerate(leaves):
        if leaf.dtype != value.dtype or leaf.size != value.size:
            continue
        if leaf.shape != value.shape and any(
            other.shape == value.shape and other.dtype == value.dtype for other in leaves
        ):
            continue
        with np.errstate(all="ignore"):
            difference = np.abs(leaf.reshape(-1).astype(np.float64) - value.reshape(-1).astype(np.float64))
        off = float(np.nan_to_num(difference, nan=np.inf).mean()) if difference.size else 0.0
        if best is None or off < best[1]:
            best = index, off
    return best
