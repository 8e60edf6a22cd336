"""Expert-choice gates are cut out: which tokens each expert takes, however many there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import one_in
from torch import nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.gates.routing import find_routings
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.trace import trace


class ChoosesAlongRows(nn.Module):
    """Scores (e, n), the chosen tokens looked up, and added back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(16, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 16, 16) * 0.2)

    def chosen(self, tokens):
        """(e, c) tokens, (e, c) weights."""
        scores = self.router(tokens).softmax(-1).t()
        weights, indices = scores.topk((tokens.shape[0] * 2 + 3) // 4, dim=-1)
        return indices, weights

    def forward(self, x):
        tokens = x.reshape(-1, 16)
        indices, weights = self.chosen(tokens)
        rows = torch.bmm(tokens[indices], self.up) * weights.unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, indices.reshape(-1), rows.reshape(-1, 16)).view_as(x)


class ChoosesAlongColumns(ChoosesAlongRows):
    """Scores (n, e): `topk` along the first axis, its result (c, e)."""

    def forward(self, x):
        tokens = x.reshape(-1, 16)
        count = int(tokens.shape[0] * 1.5 / 4 + 0.5) + 1
        weights, indices = torch.topk(self.router(tokens).softmax(-1), count, dim=0)
        weights = weights / weights.sum(0, keepdim=True)
        out = torch.zeros_like(tokens)
        for expert in range(4):
            rows = tokens[indices[:, expert]] @ self.up[expert] * weights[:, expert, None]
            out = out.index_add(0, indices[:, expert], rows)
        return out.view_as(x)

    def chosen(self, tokens):
        count = int(tokens.shape[0] * 1.5 / 4 + 0.5) + 1
        weights, indices = torch.topk(self.router(tokens).softmax(-1), count, dim=0)
        return indices.t(), (weights / weights.sum(0, keepdim=True)).t()


class Marks(ChoosesAlongRows):
    """The chosen tokens as one-hot marks, dispatched and combined by einsums."""

    def forward(self, x):
        tokens = x.reshape(-1, 16)
        indices, weights = self.chosen(tokens)
        marks = nn.functional.one_hot(indices, tokens.shape[0]).float()  # (e, c, n)
        rows = torch.bmm(torch.einsum("ecn,nd->ecd", marks, tokens), self.up)
        return torch.einsum("ecn,ec,ecd->nd", marks, weights, rows).view_as(x)


class PrunesTokens(nn.Module):
    """The tokens with the highest norms are kept: no experts choose."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(16, 1)

    def forward(self, x):
        scores = self.score(x).squeeze(-1)  # (b, n)
        kept = scores.topk(2, dim=1).indices
        return x.gather(1, kept.unsqueeze(-1).expand(-1, -1, 16))


def subject_of(module: nn.Module):
    torch.manual_seed(1)
    return make_subject(module.eval(), (torch.randn(2, 6, 16),), {}, source=Path(__file__), how="test")


@pytest.mark.parametrize(
    "gated", one_in(2, [ChoosesAlongRows, ChoosesAlongColumns, Marks]), ids=lambda each: each.__name__
)
def test_the_gate_is_a_graph_of_its_own(gated):
    module = gated()
    _, gate = export_subject(subject_of(module), Options(simplify=False))
    assert gate.kind == "gate"
    assert gate.routing == (("topk_idx", "topk_weight", "scores"),)
    session = onnxruntime.InferenceSession(ir.to_proto(gate.model).SerializeToString())
    for tokens in (3, 4, 12, 64, 257):  # from four tokens on, an expert leaves some out
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            indices, weights = module.chosen(x[0])
        (name,) = [each.name for each in session.get_inputs()]
        value = x.numpy() if len(session.get_inputs()[0].shape) == 3 else x[0].numpy()
        found = session.run(["topk_idx", "topk_weight"], {name: value})
        assert found[0].shape == tuple(indices.shape)
        assert [set(row) for row in found[0].tolist()] == [set(row) for row in indices.tolist()]
        np.testing.assert_allclose(found[1], weights.numpy(), rtol=1e-5, atol=1e-6)


def test_keeping_some_tokens_is_no_gate():
    assert find_routings(trace(subject_of(PrunesTokens()))) == ()
