"""A model in float64: its weights, its buffers, and the tensors that it keeps as neither."""

from __future__ import annotations

import torch
from torch import nn

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
