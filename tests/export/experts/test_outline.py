"""Layers that are alike are traced once; those that are not, each by itself."""

from __future__ import annotations

from pathlib import Path

import capacity
import dispatchers
import experts_idioms as idioms
import lined_up
import numpy as np
import pytest
import torch
import unflattened
from opened import session_of, subject_of
from torch import nn
from torch.nn import functional as F

from moe_export.export.experts.outline import outline_experts
from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.trace import trace


class Limited(nn.Module):
    """An expert with a number of its own."""

    def __init__(self, d, limit):
        super().__init__()
        self.up, self.down = nn.Linear(d, 24), nn.Linear(24, d)
        self.limit = limit

    def forward(self, x):
        return self.down(F.gelu(self.up(x)).clamp(-self.limit, self.limit))


def layer(seed, limit):
    block = idioms.OverHitNumbers()
    torch.manual_seed(seed)
    block.experts = nn.ModuleList(Limited(16, limit) for _ in range(block.num_experts))
    block.gate = nn.Linear(16, block.num_experts, bias=False)
    return block


def test_a_body_is_traced_once_however_many_layers_have_it():
    model = nn.Sequential(layer(1, 0.3), layer(2, 0.3), layer(3, 0.1), layer(4, 0.3)).eval()
    subject = subject_of(model)
    one, two, three, four = outline_experts(trace(subject)).blocks
    assert one.program is two.program is four.program
    assert three.program is not one.program
    assert one.experts is not two.experts

    graph = export_subject(subject, Options(gates=False, simplify=False))[0].model
    x = torch.randn(3, 7, 16)
    (found,) = session_of(graph).run(None, {"input": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "idiom",
    [
        idioms.WholeSlices,
        lined_up.Capacity,
        dispatchers.SortedColumns,
        capacity.FirstChoice,
        unflattened.Places,
    ],
)
@pytest.mark.slow_but_one
def test_the_traced_program_stays_as_it_is(idiom):
    """Finding blocks passes by copies, and makes values of its own: in a copy."""
    width = unflattened.FEATURES if idiom is unflattened.Places else 16
    subject = make_subject(idiom().eval(), (torch.randn(2, 5, width),), {}, source=Path(__file__), how="test")
    traced = trace(subject)
    before = [(node, node.target, node.args, node.kwargs) for node in traced.program.graph.nodes]
    outlined = outline_experts(traced)
    assert len(outlined.blocks) == 1
    assert [(node, node.target, node.args, node.kwargs) for node in traced.program.graph.nodes] == before
    assert outlined.traced.program is not traced.program
