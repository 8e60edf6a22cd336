"""The ONNX nodes of one equation, as text."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from moe_export.einsum_rewrite.binding import Shape
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.onnx_model import Options, rewrite_onnx

OPSET = 17


def to_onnx_text(equation: Equation, shapes: Sequence[Shape], target: str, names: str = "xyzuvw") -> str:
    """The nodes that take the place of an Einsum node, one a line, constants first."""
    count = len(shapes)
    operands = list(names[:count]) if count <= len(names) else [f"x{k}" for k in range(count)]
    inputs = [
        ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in zip(operands, shapes, strict=True)
    ]
    node = ir.node("Einsum", inputs, attributes={"equation": equation.letters}, name="out")
    node.outputs[0].name = "out"
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": OPSET}, name="einsum")
    after = rewrite_onnx(ir.Model(graph, ir_version=10), Options(target=target))
    lines = []
    for value in after.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        lines.append(f"{value.name} = {tensor.numpy().tolist()}")
    text = onnx.printer.to_text(ir.to_proto(after).graph)
    body = text[text.rindex("{\n") + 2 : text.rindex("}")]
    return "\n".join([*lines, *(_plain(line) for line in body.strip().splitlines())])


def _plain(line: str) -> str:
    """A line without the name of the node, which the name of its result repeats."""
    line = line.strip()
    return line.split("] ", 1)[1] if line.startswith("[") else line
