"""A decoder of a few nodes, written by hand: the next token is the last one plus the number of tokens so far."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WORDS = 23


def write_decoder(path: Path) -> Path:
    """Write it; logits are (batch, sequence, 23)."""
    int64, single = TensorProto.INT64, TensorProto.FLOAT
    past = ["batch", 1, "past_sequence", 1]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["as_float"], to=single),
        helper.make_node("Unsqueeze", ["as_float", "axes"], ["column"]),
        helper.make_node("Concat", ["past_key_values.0.key", "column"], ["present.0.key"], axis=2),
        helper.make_node("Shape", ["present.0.key"], ["count"], start=2, end=3),
        helper.make_node("Add", ["input_ids", "count"], ["sum"]),
        helper.make_node("Mod", ["sum", "words"], ["next"]),
        helper.make_node("OneHot", ["next", "words", "off_on"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "counting",
        [
            helper.make_tensor_value_info("input_ids", int64, ["batch", "sequence"]),
            helper.make_tensor_value_info("past_key_values.0.key", single, past),
        ],
        [
            helper.make_tensor_value_info("logits", single, ["batch", "sequence", WORDS]),
            helper.make_tensor_value_info("present.0.key", single, ["batch", 1, "total", 1]),
        ],
        [
            numpy_helper.from_array(np.array([1, 3], np.int64), "axes"),
            numpy_helper.from_array(np.array([WORDS], np.int64), "words"),
            numpy_helper.from_array(np.array([0, 1], np.float32), "off_on"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def continued(ids: list[int], count: int) -> list[int]:
    """What it makes of a prompt."""
    text = list(ids)
    for _ in range(count):
        text.append((text[-1] + len(text)) % WORDS)
    return text
