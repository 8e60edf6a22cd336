"""Reshapes and reductions of tensors without rows, which an expert without tokens has."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moe_export.export.onnx.reshapes import settle_axes, settle_reshapes
from moe_export.export.tracing.dims import DimRequest

OPERATORS = [
    ("ReduceSum(x, last)", (0,)),
    ("ReduceMax<keepdims=1>(x, last)", (0, 1)),
    ("ArgMax<axis=-1, keepdims=1>(x)", (0, 1)),
    ("Reshape(x, halves)", (0, 2, 2)),
]


@pytest.mark.parametrize(("operator", "shape"), OPERATORS)
def test_no_rows(operator, shape):
    kind = "int64" if operator.startswith("Arg") else "float"
    kept = "" if "keepdims=1" in operator or "Reshape" in operator else "<keepdims=0>"
    operator = operator.replace("ReduceSum", f"ReduceSum{kept}")
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        g (float[n, 4] x) => ({kind}[{", ".join("abc"[: len(shape)])}] y)
        <int64[1] last = {{-1}}, int64[3] halves = {{0, 2, -1}}> {{ y = {operator} }}"""
    )
    model = ir.from_proto(proto)
    settle_reshapes(model.graph)
    settle_axes(model.graph)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for rows in (0, 3):
        (y,) = session.run(None, {"x": np.zeros((rows, 4), np.float32)})
        assert y.shape == (rows, *shape[1:])


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_groups_of_no_images(tools, groups):
    """Of images whose height and width are free, the size of a group is worked out of these, if there may be none."""

    class Picked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.GroupNorm(groups, 16)

        def forward(self, x, keep):
            return self.norm(x[keep])

    images, all_of_them = torch.randn(3, 16, 4, 5), torch.ones(3, dtype=torch.bool)
    graph = tools.graph(Picked(), images, all_of_them, simplify=True)
    for keep in ([False, False, False], [True, False, True], [False, True, False]):
        tools.equal(graph, images, torch.tensor(keep))
    tools.equal(graph, torch.randn(1, 16, 1, 3), torch.tensor([False]))
    kept = tools.graph(Picked().norm, images)  # without values that pick, there are always some
    assert "ReduceProd" not in [node.op_type for node in kept.model.graph]


class Images(torch.nn.Module):
    """Experts over images, of which every image has one."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 3)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), torch.nn.GroupNorm(4, 8), torch.nn.SiLU())
            for _ in range(3)
        )

    def forward(self, x):
        weights, indices = self.gate(x.mean((2, 3))).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            images = torch.where(indices == number)[0]
            out.index_add_(0, images, expert(x[images]) * weights[images, None, None, None])
        return out


def test_experts_without_images_that_norm_groups(tools):
    graph = tools.graph(Images(), torch.randn(4, 8, 6, 5))
    assert any(note.startswith("3 experts at") for note in graph.notes)
    for shape in [(1, 8, 6, 5), (2, 8, 1, 1), (4, 8, 6, 5), (5, 8, 3, 9)]:
        tools.equal(graph, torch.randn(shape))


def test_attention_to_no_keys(tools):
    class Attends(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x * 2, x + 1)

    graph = tools.graph(Attends(), torch.randn(2, 3, 5, 4))
    kinds = [node.op_type for node in graph.model.graph]
    assert kinds.count("Transpose") == 1
    assert not {"Reshape", "Slice", "Concat"} & {*kinds}
    for length in (0, 1, 6):
        tools.equal(graph, torch.randn(1, 3, length, 4))


class Attends(torch.nn.Module):
    def __init__(self, keys):
        super().__init__()
        self.keys = keys

    def forward(self, x):
        q = x.view(2, 6, 4, 8).transpose(1, 2)
        k, v = (self.keys(part) for part in (x * 2, x + 1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize(
    "keys",
    [
        lambda x: x[..., :16].reshape(2, 6, 2, 8).transpose(1, 2),  # two queries share a head
        lambda x: x.reshape(2, 6, 2, 2, 8).permute(0, 2, 3, 1, 4).reshape(2, 4, 6, 8),
        lambda x: x.reshape(2, 6, 4, 8).reshape(2, 4, 6, 8),  # as many axes, other ones
        lambda x: x.reshape(4, 3, 32).reshape(2, 4, 6, 8),
    ],
    ids=["grouped", "five_axes", "four_axes", "three_axes"],
)
def test_keys_that_the_model_reshaped_are_turned_as_it_has_them(tools, keys):
    """Where all sizes are known, the exporter joins the model's reshape with the one of its own that goes away."""
    x = torch.randn(2, 6, 32)
    graph = tools.graph(Attends(keys), x, dims=DimRequest(static=True))
    assert [node.op_type for node in graph.model.graph].count("Reshape") <= 5
    tools.equal(graph, torch.randn(2, 6, 32))


def test_keys_of_any_length_that_change_places(tools):
    class Exchanged(torch.nn.Module):
        def forward(self, x):  # (b, l, 4, 8), looked at as (b, 4, l, 8)
            turned = x.reshape(x.shape[0], 4, x.shape[1], 8)
            return torch.nn.functional.scaled_dot_product_attention(turned, turned * 2, turned + 1)

    graph = tools.graph(Exchanged(), torch.randn(2, 5, 4, 8))
    for length in (1, 4, 7):
        tools.equal(graph, torch.randn(3, length, 4, 8))
