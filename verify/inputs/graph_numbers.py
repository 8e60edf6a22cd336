"""The integers in a graph near which its behaviour may change: limits, moduli, ends of slices, lengths of tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OF_VALUES = {
    "Clip", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Range", "Slice",
}  # fmt: skip
_TABLES = {"Gather", "GatherElements", "GatherND"}
_LEAST, _MOST = 2, 2**16  # 1 is tried anyway; what is larger is no size that is compared at
_SCALARS = 4  # elements of a constant that may be a limit, or the ends of a slice


def graph_numbers(path: Path) -> tuple[int, ...]:
    """The integers without duplicates: limits first, then the lengths of tables. Empty if the graph cannot be read."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # whoever runs the file says what is wrong with it
        return ()
    known: dict[str, Any] = {}
    found = [*_numbers(graph, known, tables=False), *_numbers(graph, known, tables=True)]
    return tuple(dict.fromkeys(number for number in found if _LEAST <= number <= _MOST))


def _numbers(graph: Any, known: dict[str, Any], *, tables: bool) -> Iterator[int]:
    known |= {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _numbers(attribute.g, known, tables=tables)
            if node.op_type == "Constant" and attribute.name == "value":
                known[node.output[0]] = attribute.t
        if tables and node.op_type in _TABLES and node.input[0] in known:
            yield from list(known[node.input[0]].dims)[:1]
        if not tables and node.op_type in _OF_VALUES:
            for name in node.input:
                yield from _scalars(known[name]) if name in known else ()


def _scalars(tensor: Any) -> Iterator[int]:
    """The whole numbers of a small constant."""
    import onnx

    count = 1
    for size in tensor.dims:
        count *= size
    if count > _SCALARS or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    for value in onnx.numpy_helper.to_array(tensor).reshape(-1).tolist():
        if isinstance(value, (int, float)) and abs(value) <= _MOST and value == int(value):
            yield abs(int(value))
