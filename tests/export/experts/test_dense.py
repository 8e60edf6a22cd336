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


class InEinsums(Dense):
    """Both products, and the sum over the experts, as einsums with the tokens in front."""

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        rows = torch.einsum("neh,ehd->ned", torch.einsum("nd,edh->neh", tokens, self.up).relu(), self.down)
        return torch.einsum("ne,ned->nd", self.weights(tokens), rows + 1).view(x.shape)


class Modules(Dense):
    """Experts that are modules."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 16)) for _ in range(4)
        )

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        return self.moe(tokens, self.weights(tokens)).view(x.shape)


class Stacked(Modules):
    """Their results stacked, weighted and added up."""

    def moe(self, x, weights):
        rows = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (weights.unsqueeze(1) @ rows).squeeze(1)


class Added(Modules):
    """Their results weighted and added one after the other, to something else."""

    def moe(self, x, weights):
        out = x
        for number, expert in enumerate(self.experts):
            out = out + weights[:, number : number + 1] * expert(x)
        return out


class ByMasks(Modules):
    """The same with the sum over a mask of what was chosen for weights."""

    def moe(self, x, weights):
        values, indices = self.gate(x).softmax(-1).topk(2)
        rows = [
            expert(x) * ((indices == e) * values).sum(-1)[:, None] for e, expert in enumerate(self.experts)
        ]
        return sum(rows)


class Exchanged(Modules):
    """The second and the third expert have each other's weights: the last expert's is its own, of no other."""

    def moe(self, x, weights):
        numbers = (0, 2, 1, 3)
        return sum(
            weights[:, number, None] * expert(x) for number, expert in zip(numbers, self.experts, strict=True)
        )


@pytest.mark.parametrize("module", [Dense, Masked, InEinsums, Stacked, Added, ByMasks])
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


@pytest.mark.parametrize("module", [Twice, Exchanged])
def test_what_is_no_sum_over_the_chosen_stays(module):
    """An expert that may be chosen twice is added up once; one that has another's gate is not its own."""
    _, blocks, _ = find_experts(trace(subject_of(module().eval())).program)
    assert blocks == ()
