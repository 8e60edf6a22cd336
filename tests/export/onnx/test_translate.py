"""Graphs with the user's names, whatever the model returns and whatever its dtypes."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from slow_cases import one_in, slow
from torch import nn


class Calls(nn.Module):
    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x, *others):
        return self.function(self, x, *others)


X = torch.randn(3, 4)


def names(values):
    return [value.name for value in values]


def test_names_and_dimensions(tools):
    graph = tools.graph(Calls(lambda m, x: {"sum": x.sum(-1), "pairs": x.flatten()}), X)
    assert names(graph.model.graph.inputs) == ["x"]
    assert names(graph.model.graph.outputs) == ["sum", "pairs"]
    shapes = {value.name: [str(size) for size in value.shape] for value in graph.model.graph.outputs}
    assert shapes == {"sum": ["batch"], "pairs": ["batch*x_dim1"]}
    tools.equal(graph, torch.randn(5, 2))


def test_every_name_that_could_collide_collides(tools):
    class Collides(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4))
            self.add = nn.Parameter(torch.randn(4))

        def forward(self, x, weight, add, val_0):
            y = self.x(x) + self.weight * weight + add + self.add + val_0
            return {"x": x + 1, "weight": y, "add": y * 2, "x.weight": y - 1, "val_0_1": y}

    graph = tools.graph(Collides(), X, torch.randn(4), X, X)
    assert names(graph.model.graph.inputs) == ["x", "weight", "add", "val_0"]
    assert names(graph.model.graph.outputs) == ["x_1", "weight_1", "add_1", "x.weight", "val_0_1"]
    tools.equal(graph, torch.randn(5, 4), torch.randn(4), torch.randn(5, 4), torch.randn(5, 4))


def test_an_output_that_is_an_input_and_one_returned_twice(tools):
    graph = tools.graph(Calls(lambda m, x: (x, x + 1, x, [x * 2] * 2)), X)
    assert len(set(names(graph.model.graph.outputs))) == 5
    tools.equal(graph, torch.randn(5, 2))


def test_an_output_that_is_a_parameter_or_a_constant(tools):
    module = Calls(
        lambda m, x: (x + 1, m.table, torch.ones(3), torch.arange(x.shape[0])), table=torch.ones(2)
    )
    tools.equal(tools.graph(module, X), torch.randn(5, 2))


@pytest.mark.parametrize(
    "function",
    one_in(
        3,
        [
            lambda m, x: x.argmax(-1),
            lambda m, x: x.argmax(-1).int(),
            lambda m, x: x > 0,
            lambda m, x: x.sum(),
            lambda m, x: (x > 0).sum(),
            lambda m, x: (x > 0).any(),
            lambda m, x: x.double(),
            lambda m, x: x[x > 0],
            lambda m, x: torch.nonzero(x > 0),
            lambda m, x: x.new_zeros(0, 3),
        ],
    ),
    ids=[
        "int64",
        "int32",
        "bool",
        "scalar",
        "int scalar",
        "bool scalar",
        "float64",
        "masked",
        "nonzero",
        "empty",
    ],
)
def test_outputs_of_every_kind(tools, function):
    tools.equal(tools.graph(Calls(function), X), torch.randn(5, 6))


def test_sizes_that_only_the_data_knows_are_named_after_their_output(tools):
    graph = tools.graph(Calls(lambda m, x: {"rows": torch.nonzero(x > 0)}), X)
    assert [str(size) for size in graph.model.graph.outputs[0].shape] == ["rows_dim0", "2"]


def test_inner_sizes_that_only_the_data_knows_are_named_after_their_value(tools):
    def rows(module, x):
        return x.new_zeros(x.shape).index_add(0, *chosen(x)), torch.cat(chosen(x * 2)[1:] * 2)

    def chosen(x):
        found = torch.nonzero(x.sum(-1) > 0)[:, 0]
        return found, x[found]

    model = tools.graph(Calls(rows), X).model
    sizes = {
        str(size) for node in model.graph for value in node.outputs for size in value.shape or ()
        if isinstance(size, ir.SymbolicDim) and size.value
    }  # fmt: skip
    assert [size for size in sizes if re.search(r"\b(u|s|unk__)\d+\b", size)] == []
    assert sizes == {"batch", "x_dim1", "nonzero_1_dim0", "nonzero_3_dim0", "2*nonzero_3_dim0"}


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.float32), slow(torch.float64)])
def test_models_in_other_precisions(tools, dtype):
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8)).to(dtype)
    graph = tools.graph(module, torch.randn(2, 8).to(dtype))
    loose = 5e-3 if dtype is torch.float16 else 1e-5
    tools.equal(graph, torch.randn(5, 8).to(dtype), rtol=loose, atol=loose)


def test_a_bfloat16_model_keeps_its_dtype(tools):
    """onnxruntime's CPU has few bfloat16 kernels, so only the graph is looked at; it passes the full check."""
    graph = tools.graph(nn.Linear(8, 8).bfloat16(), torch.randn(2, 8).bfloat16())
    assert graph.model.graph.inputs[0].dtype == ir.DataType.BFLOAT16
    assert graph.model.graph.outputs[0].dtype == ir.DataType.BFLOAT16


@pytest.mark.parametrize("dtype", [torch.int32, slow(torch.int64)])
def test_integer_inputs(tools, dtype):
    graph = tools.graph(nn.Embedding(10, 4), torch.zeros(2, 5, dtype=dtype))
    tools.equal(graph, torch.randint(0, 10, (3, 7), dtype=dtype))


def test_a_bool_input(tools):
    graph = tools.graph(Calls(lambda m, x, mask: x.masked_fill(mask, 0.0)), X, X > 0)
    tools.equal(graph, torch.randn(5, 6), torch.randn(5, 6) > 0)


def test_buffers_and_tied_weights(tools):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 4), nn.Linear(4, 50, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("scale", torch.tensor(2.0))
            self.register_buffer("table", torch.randn(4), persistent=False)

        def forward(self, ids):
            return self.head(self.embedding(ids) * self.scale + self.table)

    graph = tools.graph(Tied(), torch.zeros(1, 5, dtype=torch.int64))
    tools.equal(graph, torch.randint(0, 50, (3, 7)))


@pytest.mark.parametrize(
    ("module", "example", "other"),
    [
        slow((nn.LSTM(4, 8, 2, batch_first=True, bidirectional=True), (2, 5, 4), (3, 5, 4))),
        slow((nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (2, 4), (3, 4))),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), (2, 4), (3, 4)),
        slow((nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.GELU()), (2, 4, 9), (3, 4, 12))),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1)),
            (2, 3, 8, 8),
            (1, 3, 9, 7),
        ),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8), (3, 7, 8)),
    ],
    ids=["lstm", "weight norm", "spectral norm", "conv", "pool", "encoder"],
)
def test_modules_of_pytorch(tools, module, example, other):
    tools.equal(tools.graph(module, torch.randn(example)), torch.randn(other))


def test_einops_layers(tools):
    from einops.layers.torch import EinMix, Rearrange, Reduce

    module = nn.Sequential(
        Rearrange("b (h w) c -> b c h w", h=4),
        nn.Conv2d(3, 6, 3, padding=1),
        Reduce("b c (h 2) (w 2) -> b c h w", "max"),
        Rearrange("b c h w -> b (h w) c"),
        EinMix("b t c -> b t d", weight_shape="c d", c=6, d=5),
    )
    graph = tools.graph(module, torch.randn(2, 16, 3))
    assert "Einsum" not in {node.op_type for node in graph.model.graph.all_nodes()}
    tools.equal(graph, torch.randn(3, 32, 3))


@pytest.mark.parametrize(("rank", "causal"), [slow((3, False)), (3, True), (4, False), slow((4, True))])
def test_attention_keys_and_values_are_equally_long(tools, causal, rank):
    """PyTorch's kernel does not check it; a graph that offers two lengths would fail at the second."""
    q, k = (torch.randn(2, *([3] * (rank - 3)), length, 8) for length in (5, 6))
    module = Calls(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    graph = tools.graph(module, q, k, k.clone())
    shapes = list(graph.traced.inputs.values())
    assert shapes[1] == shapes[2] != shapes[0]
    tools.equal(graph, *(torch.randn(3, *([2] * (rank - 3)), length, 8) for length in (4, 9, 9)))


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16)])
def test_a_query_that_may_look_at_nothing_gets_zeros(tools, dtype):
    """As a padded token does: in PyTorch the result is 0, where a mean of all values is what -3e38 would give."""

    def attend(m, q, keep):
        mask = keep[:, None, None] & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        first = F.scaled_dot_product_attention(q, q, q, attn_mask=mask, scale=0.3)
        return F.scaled_dot_product_attention(first, q, q, mask, 0.0, False)

    graph = tools.graph(Calls(attend), torch.randn(2, 3, 4, 8).to(dtype), torch.ones(2, 4, dtype=torch.bool))
    ops = [node.op_type for node in graph.model.graph.all_nodes()]
    assert (ops.count("Softmax"), ops.count("ReduceMax"), ops.count("IsNaN")) == (2, 1, 0)
    assert ops.count("Where") == 3  # one for both masks, and one after each attention
    keep = torch.tensor([[False, False, True, True, False], [False] * 5, [True] * 5])
    loose = 5e-3 if dtype is torch.float16 else 1e-5  # two attentions, each rounded to 11 bits
    tools.equal(graph, torch.randn(3, 3, 5, 8).to(dtype), keep, rtol=loose, atol=loose)


def test_a_chunk_along_a_dynamic_dimension(tools):
    graph = tools.graph(Calls(lambda m, x: (x.chunk(2), torch.chunk(x, 3, dim=1))), torch.randn(4, 9))
    tools.equal(graph, torch.randn(6, 12))
    tools.equal(graph, torch.randn(7, 8))  # parts of different length


def test_one_hot_with_a_size_that_depends_on_the_input(tools):
    module = Calls(lambda m, x: F.one_hot(x.argmax(-1), num_classes=x.shape[0] + x.shape[1]))
    graph = tools.graph(module, X)
    for shape in ((1, 2), (5, 3), (20, 30)):
        tools.equal(graph, torch.randn(shape))


def test_len_of_a_tensor_stays_free(tools):
    graph = tools.graph(Calls(lambda m, x: x.view(len(x), 2, -1) / len(x)), torch.randn(3, 4))
    tools.equal(graph, torch.randn(5, 6))


def test_the_graph_is_as_exact_as_the_weights(tools):
    weight = torch.tensor([[1e-30, 3.0], [float("inf"), -0.0]])
    found = tools.run(
        tools.graph(Calls(lambda m, x: x + m.w, w=weight), torch.zeros(2, 2)).model, x=torch.zeros(2, 2)
    )
    assert np.array_equal(found["output"], weight.numpy())
