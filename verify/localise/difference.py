"""How a node differs from its counterpart in the reference: operator, attributes, what it reads, constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from moe_export.verify.localise.level import Level
from moe_export.verify.specs import describe


def differences(level: Level, node: onnx.NodeProto, theirs: Level, model: onnx.NodeProto) -> tuple[str, ...]:
    """One line for each difference; bodies are not compared.

    Args:
        level: Where the node stands.
        node: The node.
        theirs: Where its counterpart stands.
        model: The counterpart.
    """
    return tuple(_differences(level, node, theirs, model))


def _differences(level: Level, node: onnx.NodeProto, theirs: Level, model: onnx.NodeProto) -> Iterator[str]:
    if (node.domain, node.op_type) != (model.domain, model.op_type):
        yield f"it is {node.op_type}, in the reference {model.op_type}"
    mine, other = _attributes(node), _attributes(model)
    for name in dict.fromkeys([*mine, *other]):
        if mine.get(name) != other.get(name):
            yield f"its {name} is {mine.get(name, 'not set')}, in the reference {other.get(name, 'not set')}"
    if list(node.input) != list(model.input):
        yield f"it reads {', '.join(node.input)}; in the reference {', '.join(model.input)}"
    for name in dict.fromkeys(node.input):
        line = constant_difference(level.constant(name), theirs.constant(name), name)
        if name in model.input and line is not None:
            yield line


def constant_difference(
    mine: onnx.TensorProto | None, other: onnx.TensorProto | None, name: str
) -> str | None:
    """How a constant differs from its counterpart, in a line; None if it does not, or either is none."""
    if mine is None or other is None or mine.SerializeToString() == other.SerializeToString():
        return None
    ours, theirs = onnx.numpy_helper.to_array(mine), onnx.numpy_helper.to_array(other)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"its constant {name} is {describe(ours)}, in the reference {describe(theirs)}"
    with np.errstate(invalid="ignore"):
        off = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    wrong = np.where(np.isnan(off), np.inf, off)
    count = int((wrong > 0).sum())
    if not count:
        return None
    index = tuple(int(place) for place in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
    return (
        f"its constant {name} differs from the reference's in {count} of {wrong.size} elements, most at"
        f" {list(index)}: {ours[index]:.6g}, in the reference {theirs[index]:.6g}"
    )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {
        attribute.name: _plain(onnx.helper.get_attribute_value(attribute))
        for attribute in node.attribute
        if attribute.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value).tolist()
    return value.decode(errors="replace") if isinstance(value, bytes) else value
