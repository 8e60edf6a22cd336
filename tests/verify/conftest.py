"""Small real graphs, written as ONNX text and run by ONNX Runtime."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from moe_export.verify import OnnxRuntimeRunner

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'


@pytest.fixture
def graph_bytes() -> Callable[..., bytes]:
    """ONNX text, and constants by name → the bytes of a checked model."""

    def build(text: str, **constants: np.ndarray) -> bytes:
        model = onnx.parser.parse_model(HEADER + text)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in constants.items())
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()

    return build


@pytest.fixture
def graph(graph_bytes) -> Callable[..., OnnxRuntimeRunner]:
    """ONNX text, and constants by name → a runner on ONNX Runtime."""
    return lambda text, **constants: OnnxRuntimeRunner(graph_bytes(text, **constants))
