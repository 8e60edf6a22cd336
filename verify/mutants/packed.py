"""Mutants of packed weights: of codes, scales and zero points that `DequantizeLinear` makes weights of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from moe_export.verify.mutants.mutant import Constants, Mutant, name_of, places, replace_constants
from moe_export.verify.specs import Array

KIND = "packed"
STEP = 1e-2
"""Share that a scale is off by: of one block of 32 weights, a thousandth may be below what an output can show."""
_FOUR_BITS = ("int4", "uint4")
_CODES, _SCALES, _ZEROS = 0, 1, 2


def packed_mutants(model: onnx.ModelProto) -> Iterator[Mutant]:
    """Mutants of every constant that is made a weight of, directly or behind the choice of an expert."""
    arrays = Constants.of(model).arrays
    makers = {name: node for _, node in places(model.graph) for name in node.output}
    for _, node in places(model.graph):
        if node.op_type == "DequantizeLinear":
            for place, name in enumerate(node.input):
                found = _constant(name, makers, arrays)
                if found is not None:
                    yield from _of(place, found, arrays[found], node, picked=found != name)


def _constant(name: str, makers: Mapping[str, onnx.NodeProto], arrays: Mapping[str, Array]) -> str | None:
    """The constant that a value is picked out of."""
    while name not in arrays:
        node = makers.get(name)
        if node is None or node.op_type not in {"Gather", "Reshape"}:
            return None
        name = node.input[0]
    return name


def _of(place: int, name: str, array: Array, node: onnx.NodeProto, *, picked: bool) -> Iterator[Mutant]:
    blocked = any(attribute.name == "block_size" for attribute in node.attribute)
    if place == _SCALES:
        changed = array.copy(order="C")
        changed.flat[0] *= 1 + STEP
        yield _mutant(node, f"{name}[0] off by a hundredth", name, changed)
    elif array.dtype.name in {*_FOUR_BITS, "int8", "uint8"}:
        changed = array.copy(order="C")
        changed.flat[0] = int(changed.flat[0]) ^ 1
        yield _mutant(node, f"{name}[0] off by one", name, changed)
    if place == _CODES and array.dtype.name in _FOUR_BITS:
        flat = array.reshape(-1).copy()
        even = flat.size // 2 * 2
        flat[:even] = flat[:even].reshape(-1, 2)[:, ::-1].reshape(-1)
        yield _mutant(node, f"{name}: the two codes of each byte exchanged", name, flat.reshape(array.shape))
    if (
        place in {_SCALES, _ZEROS} and blocked and not picked
    ):  # which axis of a stack has blocks is not known here
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        further = np.roll(array, 1, axis)
        if not np.array_equal(further, array):
            yield _mutant(node, f"{name}: a block further", name, further)


def _mutant(node: onnx.NodeProto, what: str, name: str, array: Array) -> Mutant:
    return Mutant(KIND, name_of(node), what, replace_constants({name: array}))
