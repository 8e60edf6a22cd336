"""`com.microsoft.QMoE` in place of `com.microsoft.MoE`: a block of experts in one node, with packed weights.

```
MoE(x, logits, W1 (E, N, K), b1, W2 (E, M, N), b2)
QMoE(x, logits, W1.bytes (E, N, K / 2), W1.scale (E, N, K / 32), b1, W2.bytes, W2.scale, b2)
```
The graph has a `MoE` only if that was asked for (`--experts contrib`). Codes are not negative, those of 4 bits two in a
byte; what stands for zero is the middle. Source: the operator's schema in onnxruntime (ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from moe_export.export.quantize.find import MOE_WEIGHTS, Candidate, Left, is_moe
from moe_export.export.quantize.packed import Grid, bytes_of, scales_of
from moe_export.export.quantize.rounding import block_of
from moe_export.export.quantize.scheme import Scheme
from moe_export.export.weights.recipe import Recipe, Reshaped

_PLACES = {0: 0, 1: 1, 2: 2, 3: 4, 4: 5, 5: 7}
"""Where QMoE has what MoE has: scales stand behind each weight."""
_BITS = {"int4": 4, "int8": 8}
_LEAST_BLOCK = 16
_FITS = (
    "com.microsoft.QMoE takes int4 in whole blocks, or int8 with a scale for each output, without zero points"
)
_TOGETHER = "com.microsoft.QMoE takes all weights of a block or none"


def split_moe(found: Sequence[Candidate], scheme: Scheme) -> tuple[list[Candidate], list[Left]]:
    """Those weights that have a packed form where they stand, and those that `QMoE` does not take."""
    taken = {weight.name for weight in found if _reads(weight) is None or _fits(weight, scheme)}
    kept, left = [], []
    for weight in found:
        node = _reads(weight)
        partners = [] if node is None else [node.inputs[place] for place in MOE_WEIGHTS]
        whole = all(value is not None and value.name in taken for value in partners)
        if weight.name in taken and whole:
            kept.append(weight)
        else:
            left.append(Left(weight.name, _TOGETHER if weight.name in taken else _FITS))
    return kept, left


def _reads(weight: Candidate) -> ir.Node | None:
    return next((node for node in weight.readers if is_moe(node)), None)


def _fits(weight: Candidate, scheme: Scheme) -> bool:
    size = int(weight.value.shape[-1]) if weight.value.shape is not None else 0  # type: ignore[arg-type]
    if scheme.zero_points or len(weight.readers) > 1:
        return False
    if scheme.packing == "int8":  # in blocks, onnxruntime 1.31 gave wrong numbers for thousands of tokens
        return scheme.block is None
    block = block_of(size, scheme)
    return scheme.packing == "int4" and size % block == 0 and block >= _LEAST_BLOCK


def as_qmoe(node: ir.Node) -> ir.Node:
    """Put a `QMoE` in the place of a `MoE`, whose weights are still to be packed."""
    inputs: list[ir.Value | None] = [None] * (max(_PLACES.values()) + 1)
    for place, value in enumerate(node.inputs):
        inputs[_PLACES[place]] = value
    made = ir.node("QMoE", inputs, domain=node.domain, name=node.name)
    made.attributes.update(node.attributes)
    made.metadata_props.update(node.metadata_props)
    result, new = node.outputs[0], made.outputs[0]
    new.shape, new.type = result.shape, result.type
    assert node.graph is not None
    node.graph.insert_before(node, made)
    result.replace_all_uses_with(new, replace_graph_outputs=True)
    name = result.name
    node.graph.remove(node, safe=True)
    new.name = name
    return made


def put_weight(
    node: ir.Node, weight: ir.Value, grid: Grid, constant: Callable[[Recipe, str], ir.Value]
) -> None:
    """Give a `QMoE` one of its weights.

    Args:
        node: The operator.
        weight: In float, one of its inputs.
        grid: What it is packed as.
        constant: Makes an initializer of a recipe.
    """
    place = next(at for at, value in enumerate(node.inputs) if value is weight)
    scales: Recipe = scales_of(grid)
    if grid.scheme.block is None:
        scales = Reshaped(scales, scales.shape[:-1])
    else:
        node.attributes["block_size"] = ir.AttrInt64("block_size", grid.block)
    node.attributes["expert_weight_bits"] = ir.AttrInt64("expert_weight_bits", _BITS[grid.scheme.packing])
    node.replace_input_with(place, constant(bytes_of(grid), f"{weight.name}.{grid.scheme.packing}"))
    node.replace_input_with(place + 1, constant(scales, f"{weight.name}.scale"))
