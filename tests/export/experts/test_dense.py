"""All experts compute all tokens, with weights of 0 for those that were not chosen: the chosen pairs are enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opened import session_of, subject_of
from torch import nn

from moe_export.export.experts.recognise import find_experts
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.trace import trace


class Dense(nn.Module):
    """`bmm` of all tokens at all experts, weighted and added up."""

    def __init__(self, d: int = 16, experts: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.other = (nn.Linear(d, experts, bias=False) for _ in range(2))
        self.up = nn.Parameter(torch.randn(experts, d, 24) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, 24, d) * 0.2)

    def weights(self, x):
        values, indices = self.gate(x).topk(2)
        return torch.full((x.shape[0], 4), float("-inf")).scatter(1, indices, values).softmax(-1)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        rows = tokens.unsqueeze(0).expand(4, -1, -1)
        rows = torch.bmm(torch.relu(torch.bmm(rows, self.up)), self.down)
        return (rows * self.weights(tokens).t().unsqueeze(-1)).sum(0).view(x.shape)


class Twice(Dense):
    """Two gates may choose the same expert, whose weight then is that of the second, once."""

    def weights(self, x):
        indices = torch.stack([self.gate(x).argmax(-1), self.other(x).argmax(-1)], 1)
        return torch.zeros(x.shape[0], 4).scatter(1, indices, x[:, :2].sigmoid())


class Masked(Dense):
    """Scores times a mask of what was chosen."""

    def weights(self, x):
        scores = self.gate(x).sigmoid()
        return scores * torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)


@pytest.mark.parametrize("module", [Dense, Masked])
def test_weights_that_are_0_elsewhere_leave_the_chosen_pairs(module):
    model = module().eval()
    graph = export_subject(subject_of(model), Options(gates=False, simplify=False))[0]
    assert sum("lowered as" in note for note in graph.notes) == 1
    session = session_of(graph.model)
    for tokens in (1, 3, 64):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = model(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)


def test_an_expert_that_may_be_chosen_twice_is_added_up_once():
    blocks, _ = find_experts(trace(subject_of(Twice().eval())).program.graph)
    assert blocks == ()
