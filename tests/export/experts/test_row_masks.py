"""Masks of rows that come from no choice: `if mask.any():` is taken for true where rows are written by the mask."""

from __future__ import annotations

import numpy as np
import torch
from opened import session_of, subject_of
from torch import nn

from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.trace import trace


class ByRelu(nn.Module):
    """Each token goes to the experts whose scores are above 0, of which there may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 2)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x):
        tokens = x.flatten(0, 1)
        scores = self.router(tokens).relu()
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            on = scores[:, number] > 0
            if on.any():
                out[on] += scores[on, number].unsqueeze(1) * expert(tokens[on])
        return out.view_as(x)


def test_routing_by_relu():
    module = ByRelu().eval()
    session = session_of(export_subject(subject_of(module), Options(gates=False, simplify=False))[0].model)
    row = module.router.weight.detach().sum(0)
    some = torch.randn(3, 7, 16)
    for x in (some, some * 30, 50 * row.expand(2, 3, 16), -50 * row.expand(1, 2, 16)):  # some, all, none
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-4)
    assert not expected.any()


class Doubles(nn.Module):
    def forward(self, x):
        if (x[:, 0, 0] > 0).any():
            x = x * 2
        return x


def test_what_else_depends_on_a_mask_is_a_decision():
    traced = trace(subject_of(Doubles()))
    line = Doubles.forward.__code__.co_firstlineno + 1
    assert traced.decisions == (f"{__file__}:{line}",)
    run = traced.program.module()
    for x in (torch.ones(3, 5, 16), -torch.ones(3, 5, 16)):
        torch.testing.assert_close(run(x)[0], Doubles()(x))
