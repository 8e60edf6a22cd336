"""Weights have the names of the state_dict, and tied ones are stored once."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from moe_export.export.onnx.counted_sizes import without_counted
from moe_export.export.onnx.shared_weights import store_once
from moe_export.export.weights.recipe import Held, RecipeTensor, Transposed

WORDS, WIDTH = 37, 8


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed, self.mix = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.decay = nn.Parameter(torch.rand(WIDTH))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)) * torch.exp(-self.decay) * 0.5)


class Experts(nn.Module):
    """A router and experts, whose weights are one stack or apart, with axes as products take them or not."""

    def __init__(self, stacked, transposed):
        super().__init__()
        shape = (WIDTH, 6) if transposed else (6, WIDTH)
        self.router = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, *shape)) if stacked else None
        self.apart = None if stacked else nn.ModuleList(nn.Linear(WIDTH, 6) for _ in range(4))
        self.transposed = transposed

    def forward(self, x):
        weight, chosen = torch.topk(self.router(x).softmax(-1), 2)
        result = x.new_zeros(x.shape[0], 6)
        for expert in range(4):
            token, place = torch.where(chosen == expert)
            rows = x[token]
            if self.apart is not None:
                rows = self.apart[expert](rows)
            else:
                rows = rows @ (self.up[expert] if self.transposed else self.up[expert].T)
            result.index_add_(0, token, rows * weight[token, place, None])
        return result


def initializers(graph):
    return {name for name, value in graph.model.graph.initializers.items() if value.const_value.size > 4}


def test_weights_and_what_is_made_of_them(tools):
    graph = tools.graph(Language(False), torch.randint(0, WORDS, (2, 5)))
    assert initializers(graph) == {
        "embed.weight",
        "mix.bias",
        "mix.weight.transpose",
        "decay.neg.exp",
        "head.weight.transpose",
    }
    small = set(graph.model.graph.initializers) - initializers(graph)
    assert all(name.startswith("constant.") for name in small), small


@pytest.mark.parametrize("simplify", [False, True])
def test_tied_weights_are_stored_once(tools, simplify):
    ids = torch.randint(0, WORDS, (2, 5))
    graph = tools.graph(Language(True), ids, simplify=simplify)
    shapes = [value.shape.numpy() for value in graph.model.graph.initializers.values()]
    assert sum(math.prod(shape) == WORDS * WIDTH for shape in shapes) == 1
    assert "Transpose" in [node.op_type for node in graph.model.graph]
    tools.equal(graph, torch.randint(0, WORDS, (3, 2)))


def test_tied_weights_that_are_not_in_memory():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    weight = Held(lambda: array, ir.DataType.FLOAT, (2, 3))
    text = "g (float[n, 2] x, float[m, 3] y) => (float[n, 3] a, float[m, 2] b) { a = MatMul(x, w) b = MatMul(y, v) }"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    for name, old, recipe in (
        ("head.weight", "w", weight),
        ("head.weight.transpose", "v", Transposed(weight, (1, 0))),
    ):
        tensor = RecipeTensor(recipe, name)
        value = ir.Value(
            name=name, shape=ir.Shape(recipe.shape), type=ir.TensorType(recipe.dtype), const_value=tensor
        )
        model.graph.register_initializer(value)
        readers = [node for node in model.graph if node.inputs[1].name == old]
        readers[0].replace_input_with(1, value)
    store_once(model.graph)
    assert list(model.graph.initializers) == ["head.weight"]
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "MatMul"]


@pytest.mark.parametrize(
    ("stacked", "transposed", "names"),
    [
        (True, True, ["up.0", "up.1", "up.2", "up.3"]),
        (True, False, ["up.0.transpose", "up.3.transpose"]),
        (False, False, ["apart.0.bias", "apart.3.bias"]),
    ],
)
def test_each_experts_weights(tools, stacked, transposed, names):
    graph = tools.graph(Experts(stacked, transposed), torch.randn(5, WIDTH))
    assert set(names) <= set(graph.model.graph.initializers)
    assert not any("p_model" in name or "val_" in name for name in graph.model.graph.initializers)
    tools.equal(graph, torch.randn(7, WIDTH))


def test_a_gate_has_the_models_weights(tools):
    (gate,) = tools.gates(Experts(True, True), torch.randn(5, WIDTH))
    assert initializers(gate) == {"router.weight"}  # the bias has four numbers


def test_sizes_that_inference_counts_have_no_names():
    shape = ir.Shape(["batch", "unk__3", 4, "unk__12"])
    assert [str(dim) for dim in without_counted(shape)] == ["batch", "None", "4", "None"]
    known = ir.Shape(["n", "sequence", 4, "unk__1"])
    assert [str(dim) for dim in without_counted(shape, known)] == ["batch", "sequence", "4", "None"]
    assert without_counted(None) is None
