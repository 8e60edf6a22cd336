"""Mutants of nodes: another operator, axis, order, number or slice; a bias left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from moe_export.verify.mutants.mutant import Change, Constants, Mutant, Place, name_of, places
from moe_export.verify.mutants.weights import is_epsilon
from moe_export.verify.specs import Array, is_float

_OTHER_OPERATOR = {
    "Add": "Sub",
    "Sub": "Add",
    "Mul": "Div",
    "Div": "Mul",
    "Max": "Min",
    "Min": "Max",
    "Less": "LessOrEqual",
    "LessOrEqual": "Less",
    "Greater": "GreaterOrEqual",
    "GreaterOrEqual": "Greater",
    "And": "Or",
    "Or": "And",
    "ReduceSum": "ReduceMax",
    "ReduceMean": "ReduceMax",
    "ReduceMax": "ReduceMin",
    "ReduceMin": "ReduceMax",
    "ReduceL2": "ReduceL1",
    "ArgMax": "ArgMin",
    "ArgMin": "ArgMax",
    "Floor": "Ceil",
    "Ceil": "Floor",
    "Sqrt": "Abs",
    "Exp": "Softplus",
    "Log": "Abs",
    "Neg": "Abs",
    "Reciprocal": "Neg",
    "Cos": "Sin",
    "Sin": "Cos",
}
_OTHER_ACTIVATION = {
    "Sigmoid": "Tanh",
    "Tanh": "Sigmoid",
    "Relu": "Softplus",
    "Softplus": "Relu",
    "Erf": "Tanh",
    "Softmax": "LogSoftmax",
    "Gelu": "Relu",
    "Elu": "Relu",
    "LeakyRelu": "Relu",
    "HardSigmoid": "Sigmoid",
    "HardSwish": "Relu",
    "Mish": "Relu",
}
_HAVE_AXIS = {
    "ArgMax",
    "ArgMin",
    "Concat",
    "Gather",
    "GatherElements",
    "LogSoftmax",
    "ScatterElements",
    "Softmax",
    "Split",
    "TopK",
}
_AXIS_INPUT = {"CumSum": 1, "ReduceSum": 1, "Unsqueeze": 1, "Squeeze": 1}
_AXES_INPUT_FROM_18 = (
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceL1",
    "ReduceL2",
    "ReduceProd",
    "ReduceSumSquare",
)


def node_mutants(model: onnx.ModelProto, ranks: Mapping[str, int]) -> Iterator[Mutant]:
    """Mutants of every node, those in bodies too.

    Args:
        model: The graph.
        ranks: How many axes its values have, by name, where known.
    """
    constants = Constants.of(model)
    for place, node in places(model.graph):
        yield from _operators(place, node)
        yield from _axes(place, node, constants, ranks)
        yield from _perm(place, node)
        yield from _top_k(place, node, constants)
        yield from _epsilon(place, node, constants)
        yield from _slice(place, node, constants)
        yield from _bias(place, node, constants)


def _operators(place: Place, node: onnx.NodeProto) -> Iterator[Mutant]:
    for kind, table in (("operator", _OTHER_OPERATOR), ("activation", _OTHER_ACTIVATION)):
        other = table.get(node.op_type)
        if other is not None and not node.domain:
            yield Mutant(kind, name_of(node), f"{node.op_type} became {other}", _operator(place, other))


def _operator(place: Place, other: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        node = place.node(model)
        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        if node.op_type == "ReduceSum" and opset < 18 and len(node.input) > 1:
            _axes_as_attribute(place, model, node)
        if node.op_type in {"Gelu", "Elu", "LeakyRelu", "HardSigmoid"}:
            del node.attribute[:]
        node.op_type = other

    return change


def _axes_as_attribute(place: Place, model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Of the reductions only ReduceSum takes its axes as an input before opset 18."""
    axes = Constants.of(model).arrays.get(node.input[1])
    kept = [attribute for attribute in node.attribute if attribute.name == "keepdims"]
    del node.attribute[:]
    node.attribute.extend(kept)
    if axes is not None:
        node.attribute.append(onnx.helper.make_attribute("axes", [int(axis) for axis in axes.reshape(-1)]))
    del node.input[1:]


def _axes(
    place: Place, node: onnx.NodeProto, constants: Constants, ranks: Mapping[str, int]
) -> Iterator[Mutant]:
    rank = ranks.get(node.input[0]) if node.input else None
    if node.op_type in _HAVE_AXIS:
        axis = next((item.i for item in node.attribute if item.name == "axis"), _default_axis(node.op_type))
        for other in _other_axes(axis, rank):
            what = f"axis {axis} became {other}"
            yield Mutant("axis", name_of(node), what, _attribute(place, "axis", other))
    axes = next((list(item.ints) for item in node.attribute if item.name == "axes"), None)
    if axes is not None and len(axes) == 1:
        for other in _other_axes(axes[0], rank):
            what = f"axes {axes} became [{other}]"
            yield Mutant("axis", name_of(node), what, _attribute(place, "axes", [other]))
    index = _AXIS_INPUT.get(node.op_type, 1 if node.op_type in _AXES_INPUT_FROM_18 else None)
    if index is not None and len(node.input) > index and node.input[index] in constants.arrays:
        array = constants.arrays[node.input[index]]
        room = rank if rank is None or node.op_type != "Unsqueeze" else rank + 1
        if array.size == 1:
            for other in _other_axes(int(array.reshape(-1)[0]), room):
                what = f"axis {int(array.reshape(-1)[0])} became {other}"
                yield Mutant(
                    "axis", name_of(node), what, own_constant(place, index, np.full_like(array, other))
                )


def _default_axis(op_type: str) -> int:
    return -1 if op_type in {"Softmax", "LogSoftmax", "TopK"} else 0


def _other_axes(axis: int, rank: int | None) -> list[int]:
    """The axis before; of the first one the next."""
    if rank is None or rank < 2:
        return []
    here = axis % rank
    return [here - 1 if here else 1]


def _attribute(place: Place, name: str, value: object) -> Change:
    def change(model: onnx.ModelProto) -> None:
        node = place.node(model)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


def own_constant(place: Place, index: int, array: Array) -> Change:
    """Give one input of one node a constant of its own."""

    def change(model: onnx.ModelProto) -> None:
        plain = np.ascontiguousarray(array).reshape(array.shape)  # or () becomes (1,)
        model.graph.initializer.append(onnx.numpy_helper.from_array(plain, "mutated"))
        place.node(model).input[index] = "mutated"

    return change


def _perm(place: Place, node: onnx.NodeProto) -> Iterator[Mutant]:
    if node.op_type != "Transpose":
        return
    perm = next((list(item.ints) for item in node.attribute if item.name == "perm"), [])
    last = len(perm) - 1
    for first, second in sorted({(0, 1), (last - 1, last)} if last > 0 else ()):
        other = list(perm)
        other[first], other[second] = other[second], other[first]
        yield Mutant("perm", name_of(node), f"perm {perm} became {other}", _attribute(place, "perm", other))


def _top_k(place: Place, node: onnx.NodeProto, constants: Constants) -> Iterator[Mutant]:
    if node.op_type != "TopK":
        return
    largest = next((item.i for item in node.attribute if item.name == "largest"), 1)
    what = "the smallest for the largest" if largest else "the largest for the smallest"
    yield Mutant("top-k", name_of(node), what, _attribute(place, "largest", 1 - largest))
    k = constants.arrays.get(node.input[1])
    if k is not None:
        for other in (int(k.reshape(-1)[0]) - 1, int(k.reshape(-1)[0]) + 1):
            if other > 0:
                what = f"k {int(k.reshape(-1)[0])} became {other}"
                yield Mutant("top-k", name_of(node), what, own_constant(place, 1, np.full_like(k, other)))


def _epsilon(place: Place, node: onnx.NodeProto, constants: Constants) -> Iterator[Mutant]:
    for attribute in node.attribute:
        if attribute.name == "epsilon":
            what = f"epsilon {attribute.f:g} became {10 * attribute.f:g}"
            yield Mutant("epsilon", name_of(node), what, _attribute(place, "epsilon", 10 * attribute.f))
    for index, name in enumerate(node.input):
        array = constants.arrays.get(name)
        if array is not None and is_epsilon(array):
            value = float(array.reshape(-1)[0])
            what = f"{name}: {value:g} became {10 * value:g}"
            yield Mutant(
                "epsilon", name_of(node), what, own_constant(place, index, array * np.array(10, array.dtype))
            )


def _slice(place: Place, node: onnx.NodeProto, constants: Constants) -> Iterator[Mutant]:
    wanted = {"Slice": ((1, "start"), (2, "end")), "Gather": ((1, "index"),), "Split": ((1, "parts"),)}
    for index, word in wanted.get(node.op_type, ()):
        array = constants.arrays.get(node.input[index]) if len(node.input) > index else None
        if array is None or array.dtype.kind != "i" or not array.size:
            continue
        if word == "parts":
            if array.size > 1 and array.reshape(-1)[0] > 1:
                other = array.copy()
                other[0] -= 1
                other[1] += 1
                what = f"parts {array.tolist()} became {other.tolist()}"
                yield Mutant("slice", name_of(node), what, own_constant(place, index, other))
            continue
        for step in (-1, 1):
            if abs(int(array.reshape(-1)[0])) < 2**31 - 1:
                other = array + np.array(step, array.dtype)
                what = f"{word} {array.tolist()} became {other.tolist()}"
                yield Mutant("slice", name_of(node), what, own_constant(place, index, other))


def _bias(place: Place, node: onnx.NodeProto, constants: Constants) -> Iterator[Mutant]:
    if node.op_type in {"Gemm", "Conv", "ConvTranspose"} and len(node.input) > 2 and node.input[2]:
        yield Mutant("bias", name_of(node), "left out", _without_input(place, 2))
    if node.op_type == "LayerNormalization" and len(node.input) > 2 and node.input[2]:
        yield Mutant("bias", name_of(node), "left out", _without_input(place, 2))
    if node.op_type == "Add":
        for index, name in enumerate(node.input):
            array = constants.arrays.get(name)
            if array is not None and array.ndim == 1 and is_float(array.dtype) and array.size > 1:
                yield Mutant("bias", name_of(node), f"{name} left out", _identity(place, 1 - index))


def _without_input(place: Place, index: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        del place.node(model).input[index:]

    return change


def _identity(place: Place, index: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        node = place.node(model)
        kept = node.input[index]
        node.op_type = "Identity"
        del node.input[:]
        node.input.append(kept)

    return change
