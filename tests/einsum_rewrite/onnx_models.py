"""ONNX models of many Einsum nodes at once: one model and one session are much quicker than hundreds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from moe_export.einsum_rewrite.equation import Equation

Shape = Sequence[int | str | None]


@dataclass(frozen=True)
class Problem:
    """An equation in torch's letters, and the shapes that the file tells."""

    equation: str
    shapes: Sequence[Shape]
    rank: int


def problem(text: str, shapes: Sequence[Shape], notation: str = "torch") -> Problem:
    equation = Equation.parse(text, "einops" if notation == "einops" else "torch")
    dots = [len(s) - sum(x != "..." for x in t) for s, t in zip(shapes, equation.inputs, strict=True)]
    rank = sum(max(dots) if label == "..." else 1 for label in equation.output)
    return Problem(equation.letters, shapes, rank)


def model_of(
    problems: Sequence[Problem], dtype: int = TensorProto.INT64, opset: int = 17, typed: bool = True
) -> onnx.ModelProto:
    """A model with one Einsum a problem, inputs `x0_0, x0_1, x1_0, ...` and outputs `y0, y1, ...`."""
    nodes, inputs, outputs = [], [], []
    for number, one in enumerate(problems):
        names = [f"x{number}_{k}" for k in range(len(one.shapes))]
        nodes.append(
            helper.make_node("Einsum", names, [f"y{number}"], f"einsum{number}", equation=one.equation)
        )
        inputs += [
            helper.make_tensor_value_info(name, dtype, list(shape) if typed else None)
            for name, shape in zip(names, one.shapes, strict=True)
        ]
        outputs.append(
            helper.make_tensor_value_info(f"y{number}", dtype, [None] * one.rank if typed else None)
        )
    graph = helper.make_graph(nodes, "einsums", inputs, outputs)
    ir_version = 7 if opset < 14 else 10
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def compute(model: onnx.ModelProto, operands: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Run a model of `model_of` in ONNX Runtime."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    feeds = {f"x{i}_{k}": x for i, xs in enumerate(operands) for k, x in enumerate(xs)}
    return [np.asarray(y) for y in session.run(None, {k: v for k, v in feeds.items() if k in names})]


def integers(shapes: Sequence[Sequence[int]], seed: int = 0) -> list[np.ndarray]:
    """Small integers, whose sums and products are exact."""
    generator = np.random.default_rng(seed + len(shapes))
    return [generator.integers(-3, 4, shape) for shape in shapes]
