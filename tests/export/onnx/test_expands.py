"""Expands that repeat what the operators behind them repeat anyway are left out; those that do something stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.expands import drop_expands
from moe_export.export.pipeline import Options, export_subject


class Normalize(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


class Kept(nn.Module):
    """The sum of what is repeated is larger than what is not."""

    def forward(self, x):
        wide = x[:, :1].expand_as(x)
        return wide.cumsum(1) + x, wide * 2


@pytest.mark.parametrize(("module", "expands"), [(Normalize(), 0), (Kept(), 1)])
def test_models(module, expands):
    example = torch.randn(3, 5)
    subject = make_subject(module, (example,), {}, source=Path(__file__), how="a test")
    model = export_subject(subject, Options(gates=False))[0].model
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Expand") == expands
    used = {value for node in model.graph for value in node.inputs}
    assert set(model.graph.initializers.values()) <= used
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for tokens in (1, 3, 8):
        x = torch.randn(tokens, 5)
        found = session.run(None, {"x": x.numpy()})
        for want, got in zip(subject.call([x]), found, strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-6)


def graph_of(small: list, shape: list, other: list) -> ir.Model:
    """y = other + Expand(small)."""
    values = {"a": small, "b": other, "y": shape}
    infos = {
        key: onnx.helper.make_tensor_value_info(key, onnx.TensorProto.FLOAT, size)
        for key, size in values.items()
    }
    sizes = onnx.helper.make_tensor_value_info("s", onnx.TensorProto.INT64, [len(shape)])
    nodes = [
        onnx.helper.make_node("Expand", ["a", "s"], ["e"]),
        onnx.helper.make_node("Add", ["b", "e"], ["y"]),
    ]
    inner = [onnx.helper.make_tensor_value_info("e", onnx.TensorProto.FLOAT, shape)]
    graph = onnx.helper.make_graph(
        nodes, "g", [infos["a"], infos["b"], sizes], [infos["y"]], value_info=inner
    )
    return ir.from_proto(onnx.helper.make_model(graph))


@pytest.mark.parametrize(
    ("small", "shape", "other", "dropped"),
    [
        (["n", 1], ["n", 4], ["n", 4], True),
        ([1], ["n", 4], ["n", 4], True),
        (["n", 1], ["n", 4], [4], True),
        (["n", 1], ["n", 4], ["n", 1], False),  # nothing else has the 4
        ([1, 4], ["n", 4], ["m", 4], False),  # another size, for all that is known
        ([1, 4], [None, 4], [None, 4], False),  # a size that nobody knows
        ([4], [1, 4], [4], False),  # one axis more
    ],
)
def test_only_where_the_result_has_the_same_shape(small, shape, other, dropped):
    model = graph_of(small, shape, other)
    drop_expands(model.graph)
    add = next(node for node in model.graph if node.op_type == "Add")
    assert (add.inputs[1].name == "a") == dropped
