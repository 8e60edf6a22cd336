"""Small graphs in ONNX's text form, for engines."""

from __future__ import annotations

import onnx
import pytest

HEAD = '<ir_version: 8, opset_import: ["": {opset}]>\n'


def graph(text: str, opset: int = 17, **metadata: str) -> onnx.ModelProto:
    """A graph from its text; metadata of every node by keyword."""
    model = onnx.parser.parse_model(HEAD.format(opset=opset) + text)
    for node in model.graph.node:
        for key, value in metadata.items():
            node.metadata_props.add(key=key, value=value)
    return model


@pytest.fixture(scope="session")
def onnx_graph():
    return graph


@pytest.fixture(scope="session")
def linear():
    """One matrix product with a free number of rows."""
    return graph("linear (float[rows, 32] x, float[32, 8] w) => (float[rows, 8] y) { y = MatMul(x, w) }")
