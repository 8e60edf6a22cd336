"""Does a loop carry a tensor whose shape changes? Asked of ONNX's shape inference with concrete sizes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

_SIZES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41)  # one for each name; any may be taken, they are told apart


def growing_states(loop: ir.Node, opset: int) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The states of a Loop or Scan that are seen to leave an iteration with another shape than they entered with.

    Args:
        loop: The node.
        opset: Of the graph.

    Yields:
        The state's name in the body, and its shape before and after one iteration, with numbers for symbolic sizes. A
        state whose shape cannot be inferred is not among them.
    """
    attribute = loop.attributes.get("body")
    if attribute is None:
        return
    body = attribute.as_graph()
    extra = 2 if loop.op_type == "Loop" else 0
    count = (
        len(loop.inputs) - extra
        if loop.op_type == "Loop"
        else len(loop.inputs) - loop.attributes.get_int("num_scan_inputs", 0)
    )
    states = list(body.inputs)[extra : extra + count]
    results = list(body.outputs)[1 if extra else 0 :][:count]
    numbers: dict[str, int] = {}
    taken = [_sizes(state, given, numbers) for state, given in zip(states, loop.inputs[extra:], strict=False)]
    inferred = _infer(body, dict(zip(states, taken, strict=False)), numbers, opset)
    for state, before, result in zip(states, taken, results, strict=False):
        after = inferred.get(str(result.name))
        if before is not None and after is not None and None not in after and before != after:
            yield str(state.name), before, tuple(size for size in after if size is not None)


def _sizes(state: ir.Value, given: ir.Value | None, numbers: dict[str, int]) -> tuple[int, ...] | None:
    """A concrete shape: of what is given at first, else of what the body says that it takes."""
    shape = given.shape if given is not None and given.shape is not None else state.shape
    if shape is None:
        return None
    return tuple(_number(dim, numbers) for dim in shape)


def _number(dim: int | ir.SymbolicDim, numbers: dict[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    name = dim.value or f"?{len(numbers)}"
    return numbers.setdefault(name, _SIZES[len(numbers) % len(_SIZES)] + 2 * (len(numbers) // len(_SIZES)))


def _infer(
    body: ir.Graph, states: dict[ir.Value, tuple[int, ...] | None], numbers: dict[str, int], opset: int
) -> dict[str, tuple[int | None, ...]]:
    """The shapes of a body's outputs, as ONNX infers them from the concrete shapes of what it takes."""
    proto = ir.serde.serialize_graph(body)
    del proto.value_info[:]
    for output in proto.output:
        output.type.tensor_type.ClearField("shape")
    for info, value in zip(proto.input, body.inputs, strict=True):
        _set_shape(info, states[value] if value in states else _sizes(value, None, numbers))
    for value in _captured(body):
        info = proto.input.add(name=str(value.name))
        info.type.tensor_type.elem_type = int(value.dtype or 1)
        constant = value.const_value
        if constant is not None and constant.size <= 8:
            proto.initializer.append(ir.serde.serialize_tensor(constant))
            proto.initializer[-1].name = str(value.name)
        _set_shape(info, _sizes(value, None, numbers))
    model = onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        found = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return {}
    return {
        output.name: _shape_of(output)
        for output in found.graph.output
        if output.type.tensor_type.HasField("shape")
    }


def _captured(body: ir.Graph) -> list[ir.Value]:
    """Values of outer graphs that a body, or a body inside it, reads."""
    own = {*body.inputs, *body.initializers.values()}
    for node in body.all_nodes():
        own.update(node.outputs)
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                own.update(attribute.as_graph().inputs)
                own.update(attribute.as_graph().initializers.values())
    read = [value for node in body.all_nodes() for value in node.inputs if value is not None]
    return [value for value in dict.fromkeys(read) if value not in own]


def _set_shape(info: onnx.ValueInfoProto, shape: tuple[int, ...] | None) -> None:
    info.type.tensor_type.ClearField("shape")
    if shape is not None:
        info.type.tensor_type.shape.SetInParent()
        for size in shape:
            info.type.tensor_type.shape.dim.add(dim_value=size)


def _shape_of(info: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else None for dim in info.type.tensor_type.shape.dim
    )
