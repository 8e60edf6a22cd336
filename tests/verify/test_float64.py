"""A model in float64: its weights, its buffers, and the tensors that it keeps as neither."""

from __future__ import annotations

import torch
from torch import nn

from moe_export import float64
from moe_export.float64 import double_module, in_float64


class Keeps(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.matrix = torch.eye(3) * 0.1
        self.several, self.named, self.fixed = (
            [torch.ones(3)],
            {"a": torch.ones(3), "b": 1},
            (torch.ones(3), "c"),
        )
        self.shared, self.ids = shared, torch.arange(3)

    def forward(self, x):
        y = self.layer(x) @ self.matrix + self.several[0] + self.named["a"] + self.fixed[0]
        return (y + self.shared[0])[:, self.ids]


def test_tensors_in_attributes_are_doubled():
    shared = [torch.full((3,), 0.1)]
    model = nn.Sequential(Keeps(shared), Keeps(shared))
    wide = double_module(model)
    x = torch.randn(2, 3)
    with in_float64(), torch.no_grad():
        found = wide(x.double())
    assert found.dtype is torch.float64
    torch.testing.assert_close(found.float(), model(x))
    assert wide[0].shared is wide[1].shared
    assert wide[0].ids.dtype is torch.int64
    assert shared[0].dtype is model[0].matrix.dtype is torch.float32  # the model itself stays


class Takes(nn.Module):
    """Takes its weights in the ways that models do."""

    def __init__(self):
        super().__init__()
        self.layer, self.words = nn.Linear(4, 4), nn.Embedding(5, 4)
        self.stack = nn.Parameter(torch.randn(3, 4, 4))
        self.register_buffer("table", torch.randn(4, 4))

    def forward(self, ids, x):
        x = x.to(self.stack.dtype) + self.words(ids)
        for expert in range(len(self.stack)):
            x = x @ self.stack[expert] + torch.cat([self.stack[expert], self.table]).sum()
        return self.layer(x) @ self.layer.weight.T * self.table.shape[0] + self.stack.float().mean()


def test_weights_of_a_large_model_are_widened_where_they_are_taken(monkeypatch):
    torch.manual_seed(0)
    model, ids, x = Takes(), torch.tensor([1, 4]), torch.randn(2, 4)
    wanted = double_module(model)
    monkeypatch.setattr(float64, "_COPIED", 0)
    monkeypatch.setattr(float64, "_SMALL", 16)
    wide = double_module(model)
    assert wide.stack is model.stack
    assert wide.table is model.table
    assert wide.layer.bias.dtype is torch.float64  # small ones are copied
    with in_float64(), torch.no_grad():
        found = wide(ids, x.double())
        torch.testing.assert_close(found, wanted(ids, x.double()), rtol=1e-14, atol=1e-14)
    assert found.dtype is torch.float64
    assert model(ids, x).dtype is model.stack.dtype is torch.float32
