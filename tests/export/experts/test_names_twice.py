"""`out[token] += rows` where a token names an expert twice: PyTorch keeps the last of its rows, and so does a graph."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import only
from torch import nn

from moe_export.export import Options, export_subject
from moe_export.export.frontend.subject import make_subject


class Experts(nn.Module):
    """Experts whose choices are `chosen`: (tokens, 2)."""

    def __init__(self, chosen, adds):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.router = nn.Linear(4, 3)
        self.chosen, self.adds = chosen, adds

    def forward(self, x):
        indices, weights = self.chosen(self, x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(indices == number)
            rows = expert(x[token]) * weights[token, slot, None]
            if self.adds:
                out.index_add_(0, token, rows)
            else:
                out[token] += rows
        return out


def _hashed(module, x):
    """Each token chooses twice by its own number, and often the same expert."""
    number = torch.arange(x.shape[0])
    return torch.stack([number % 3, number // 2 % 3], 1), torch.ones(x.shape[0], 2) * torch.tensor(
        [1.0, 10.0]
    )


def _twice(module, x):
    """The best expert twice."""
    weights, indices = module.router(x).softmax(-1).topk(1)
    return indices.expand(-1, 2), weights.expand(-1, 2) * torch.tensor([1.0, 10.0])


def _best(module, x):
    weights, indices = module.router(x).softmax(-1).topk(2)
    return indices, weights


@pytest.mark.parametrize(
    ("chosen", "adds"),
    only(
        [(_hashed, False), (_best, False), (_twice, True)],
        [(chosen, adds) for chosen in (_hashed, _twice, _best) for adds in (False, True)],
    ),
)
def test_the_last_row_of_a_token_is_kept(tmp_path, chosen, adds):
    torch.manual_seed(0)
    module = Experts(chosen, adds)
    x = torch.randn(7, 4)
    subject = make_subject(module, (x,), {}, source=tmp_path / "model.py", how="")
    graph = export_subject(subject, Options(gates=False))[0]
    data = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for tokens in (7, 1, 2, 12):
        y = torch.randn(tokens, 4)
        (found,) = session.run(None, {"x": y.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(y).detach(), rtol=1e-4, atol=1e-5)
    recognised = bool(graph.program.blocks)
    assert recognised or chosen is not _best  # whose choices are known to differ
    if not adds and chosen is not _best:
        assert not recognised
