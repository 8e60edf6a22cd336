"""Write packed weights into a graph: their codes and scales, and the operators that make weights of them again.

| codes | form |
|---|---|
| as they are stored, or a stack picked by `Gather` | `DequantizeLinear`, by the axis or in blocks |
| 8 bits, several experts at once, below opset 21 | `Cast` and `Mul`: there, `DequantizeLinear` has one axis of scales |
| a stack picked by `Gather`, for TensorRT | `DequantizeLinear` of the whole stack, before `Gather` |
| a stack of `com.microsoft.MoE` | `com.microsoft.QMoE` |
| 4 bits, picked by `Gather` | bytes are picked, which `Gather` takes, and taken apart by `BitShift` |

8-bit floats of a model in half precision may have scales of float32 (`Grid.scale_dtype`); `Cast` follows then.

A weight is dequantised where it is used, in front of its reader, so that runtimes can join both, and none has to keep
weights in float that it does not use yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from moe_export.errors import Code, NotExportableError
from moe_export.export.onnx.bodies import with_inner
from moe_export.export.quantize.find import Candidate, is_moe
from moe_export.export.quantize.packed import Grid, bytes_of, codes_of, scales_of, zeros_of
from moe_export.export.quantize.qmoe import as_qmoe, put_weight
from moe_export.export.quantize.scheme import BLOCKED
from moe_export.export.weights.recipe import Recipe, RecipeTensor
from moe_export.graph_builder import Array, Constants, GraphBuilder

_HALF = 4
"""Bits of a code in half a byte."""


class Writer:
    """Puts packed weights in the place of weights, in a graph.

    Args:
        model: Changed in place.
        streamed: Whether packed weights are written from where their weights are, rather than computed now.
    """

    def __init__(self, model: ir.Model, *, streamed: bool) -> None:
        self._graph = model.graph
        self._opset = model.opset_imports[""]
        self._streamed = streamed
        self._constants = Constants(model.graph)
        self._outer: Mapping[ir.Node, ir.Node] = {
            inner: node for node in model.graph for inner in with_inner(node)
        }
        self._moe: dict[ir.Node, ir.Node] = {}
        self._places = {node: place for place, node in enumerate(model.graph)}

    def put(self, weight: Candidate, grid: Grid) -> None:
        """Replace one weight.

        Raises:
            NotExportableError: Its codes have no form here.
        """
        if any(is_moe(node) for node in weight.readers):
            self._in_moe(weight, grid)
            return
        picks = "Gather" if not grid.scheme.tensorrt else None
        picking = [node for node in weight.readers if node.op_type == picks]
        others = [node for node in weight.readers if node not in picking]
        for node in picking:
            self._pick(node, weight, grid)
        if others:
            self._read_directly(others, weight, grid)
        del self._graph.initializers[weight.name]

    def _in_moe(self, weight: Candidate, grid: Grid) -> None:
        """A weight of `com.microsoft.MoE`, which becomes a `QMoE` with the first of them."""
        (node,) = weight.readers
        if node not in self._moe:
            self._moe[node] = as_qmoe(node)
        put_weight(self._moe[node], weight.value, grid, self._constant)
        del self._graph.initializers[weight.name]

    def _read_directly(self, nodes: Sequence[ir.Node], weight: Candidate, grid: Grid) -> None:
        """Nodes that read the weight as it is stored. What `Gemm` would turn is stored turned: runtimes join
        `DequantizeLinear` with `MatMul`, and with nothing else.
        """
        turned = all(_is_product_with(node, weight.value, turned=True) for node in nodes)
        if turned:
            grid = grid.turned()
        first = min((self._outer[node] for node in nodes), key=self._places.__getitem__)
        w = GraphBuilder(self._constants, weight.name, first, before=first, typed=True)
        codes = self._constant(codes_of(grid), f"{weight.name}.{grid.scheme.packing}")
        made = self._dequantized(w, grid, codes, *self._scales(grid, weight.name), axis=grid.axis)
        made.shape, made.type = ir.Shape(grid.source.shape), weight.value.type
        for node in nodes:
            if turned or _is_product_with(node, weight.value, turned=False):
                _as_matmul(self._constants, node, made)
                continue
            for place, value in enumerate(node.inputs):
                if value is weight.value:
                    node.replace_input_with(place, made)

    def _pick(self, node: ir.Node, weight: Candidate, grid: Grid) -> None:
        """`Gather(weight, index)`: what is picked is packed, and dequantised then."""
        index, result = node.inputs[1], node.outputs[0]
        assert index is not None
        assert index.shape is not None
        w = GraphBuilder(self._constants, str(weight.name), node, before=node, typed=True)
        axis = grid.axis - 1 + len(index.shape)
        scales, zeros = self._scales(grid, weight.name, gathered=grid.scheme.packing == "int4")
        picked = [
            w.op("Gather", value, index, axis=0) if value is not None else None for value in (scales, zeros)
        ]
        assert picked[0] is not None
        if grid.scheme.packing == "float8e4m3":
            raise NotExportableError(
                f"{weight.name}: ONNX picks no expert out of a stack of 8-bit floats",
                code=Code.EXPERTS_FORM,
                hint="--experts slices keeps experts apart; or --weights-dtype int8",
            )
        if grid.scheme.packing == "int4":
            stored = self._constant(bytes_of(grid), f"{weight.name}.int4")
            codes = _apart(w, w.op("Gather", stored, index, axis=0), grid.source.shape[-1])
            if picked[1] is None:
                middle = w.constant(np.array(8, np.uint8))
                picked[1] = w.op("Expand", middle, w.op("Shape", picked[0]))
        else:
            stored = self._constant(codes_of(grid), f"{weight.name}.{grid.scheme.packing}")
            codes = w.op("Gather", stored, index, axis=0)
        made = self._dequantized(w, grid, codes, picked[0], picked[1], axis=axis, rank=axis_count(node, grid))
        made.shape, made.type = result.shape, result.type
        result.replace_all_uses_with(made, replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)

    def _scales(self, grid: Grid, name: str, *, gathered: bool = False) -> tuple[ir.Value, ir.Value | None]:
        dtype = ir.DataType.UINT8 if gathered else grid.scheme.stored
        zeros = self._constant(zeros_of(grid, dtype), f"{name}.zero") if grid.scheme.zero_points else None
        return self._constant(scales_of(grid), f"{name}.scale"), zeros

    def _constant(self, recipe: Recipe, name: str) -> ir.Value:
        known = self._graph.initializers.get(name)
        if known is not None:
            return known
        if self._streamed:
            return self._constants.add(RecipeTensor(recipe, name), name)
        return self._constants.add(ir.Tensor(recipe.array(), dtype=recipe.dtype), name)

    def _dequantized(
        self,
        w: GraphBuilder,
        grid: Grid,
        codes: ir.Value,
        scales: ir.Value,
        zeros: ir.Value | None,
        *,
        axis: int,
        rank: int | None = None,
    ) -> ir.Value:
        """Weights from codes whose summed axis is `axis`."""
        rank = len(grid.source.shape) if rank is None else rank
        found = self._multiplied(w, grid, codes, scales, zeros, axis=axis, rank=rank)
        return found if grid.scale_dtype == grid.source.dtype else w.op("Cast", found, to=grid.source.dtype)

    def _multiplied(
        self,
        w: GraphBuilder,
        grid: Grid,
        codes: ir.Value,
        scales: ir.Value,
        zeros: ir.Value | None,
        *,
        axis: int,
        rank: int,
    ) -> ir.Value:
        """Codes less their zero points times their scales, in the scales' type."""
        by_output = grid.scheme.block is None and rank == 2
        if by_output:  # one scale for each output: along the other axis
            flat = w.ints(-1)
            line = [w.op("Reshape", one, flat) if one is not None else None for one in (scales, zeros)]
            return w.op("DequantizeLinear", codes, *_without_last_none(line), axis=1 - axis)
        if self._opset >= BLOCKED:
            taken = _without_last_none([scales, zeros])
            return w.op("DequantizeLinear", codes, *taken, axis=axis, block_size=grid.block)
        found = w.op("Cast", codes, to=grid.scale_dtype)
        if zeros is not None:
            found = w.op("Sub", found, w.op("Cast", zeros, to=grid.scale_dtype))
        return w.op("Mul", found, scales)


def _is_product_with(node: ir.Node, weight: ir.Value, *, turned: bool) -> bool:
    """Whether a node is `Gemm(x, weight)` and nothing more than a product, with the weight turned or as it is."""
    plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
    return (
        (node.op_type, node.domain) == ("Gemm", "")
        and plain
        and not node.attributes.get_int("transA", 0)
        and bool(node.attributes.get_int("transB", 0)) == turned
        and [place for place, value in enumerate(node.inputs) if value is weight] == [1]
    )


def _as_matmul(constants: Constants, node: ir.Node, weight: ir.Value) -> None:
    """`Gemm(x, ·, bias)` becomes `MatMul(x, weight) + bias`."""
    result, bias = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    w = GraphBuilder(constants, str(node.name), node, before=node, typed=True)
    made = w.op("MatMul", node.inputs[0], weight)
    made.shape = result.shape
    if bias is not None:
        made = w.op("Add", made, bias)
    made.shape, made.type = result.shape, result.type
    name = result.name
    result.replace_all_uses_with(made, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    made.name = name


def axis_count(node: ir.Node, grid: Grid) -> int:
    """The number of axes of what a `Gather` picks out of a stack."""
    index = node.inputs[1]
    assert index is not None
    assert index.shape is not None
    return len(index.shape) + len(grid.source.shape) - 1


def _without_last_none(values: list[ir.Value | None]) -> list[ir.Value | None]:
    return values if values[-1] is not None else values[:-1]


def _apart(w: GraphBuilder, halves: ir.Value, size: int) -> ir.Value:
    """Codes (..., N) out of bytes (..., N / 2), the first in the lower half."""
    four: Array = np.array(_HALF, np.uint8)
    bits = w.constant(four)
    high = w.op("BitShift", halves, bits, direction="RIGHT")
    low = w.op("BitShift", w.op("BitShift", halves, bits, direction="LEFT"), bits, direction="RIGHT")
    pairs = w.op("Concat", w.op("Unsqueeze", low, w.ints(-1)), w.op("Unsqueeze", high, w.ints(-1)), axis=-1)
    lead = w.op("Slice", w.op("Shape", halves), w.ints(0), w.ints(-1), w.ints(0))
    codes = w.op("Reshape", pairs, w.op("Concat", lead, w.ints(-1), axis=0))
    return codes if size % 2 == 0 else w.op("Slice", codes, w.ints(0), w.ints(size), w.ints(-1))
