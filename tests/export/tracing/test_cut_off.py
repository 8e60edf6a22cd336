"""Rows that are cut off at a limit are cut off at every size, and what only looks like it is not taken for it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from opened import session_of
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.trace import trace


class Limited(nn.Module):
    """Experts that take their first tokens only."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def limit(self, tokens):
        return int(tokens * 2 / 4 * 1.25)

    def forward(self, x):
        weights, indices = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        limit = self.limit(x.shape[0])
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(indices == number)
            token, slot = self.cut(token, slot, limit)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def subject_of(module):
    return make_subject(module, (torch.randn(11, 8),), {}, source=Path(__file__), how="test")


class ByExpression(Limited):
    def cut(self, token, slot, limit):
        kept = token[:limit] if token.numel() > limit else token
        return kept, slot[:limit] if slot.size(0) >= limit else slot


class InPlace(Limited):
    def limit(self, tokens):
        return 3

    def cut(self, token, slot, limit):
        if token.shape[0] > limit:
            token, slot = token[:limit], slot[:limit]
        return token, slot


class BothWays(Limited):
    def limit(self, tokens):
        return math.ceil(tokens * 2 / 4)

    def cut(self, token, slot, limit):
        if limit >= token.numel():
            first, second = token, slot
        else:
            first = token[:limit]
            second = slot[:limit]
        return first, second


class Both(Limited):
    """A limit that may be negative: then the last rows go."""

    def limit(self, tokens):
        return tokens - 5

    def cut(self, token, slot, limit):
        return (token[:limit], slot[:limit]) if token.numel() > limit else (token, slot)


class AtLeastOne(Limited):
    def limit(self, tokens):
        return tokens * 2 // 4

    def cut(self, token, slot, limit):
        if token.size(0) > limit + 1:
            token = token[: limit + 1]
            slot = slot[: limit + 1]
        return token, slot


@pytest.mark.parametrize("module", [ByExpression, InPlace, BothWays, Both, AtLeastOne])
def test_rows_are_cut_off_at_every_size(module):
    torch.manual_seed(0)
    model = module().eval()
    graph = export_subject(subject_of(model), Options(gates=False, simplify=False))[0]
    session, cut, kept = session_of(graph.model), 0, 0
    for tokens in (1, 2, 3, 4, 7, 11, 12, 13, 64):
        for x in (torch.randn(tokens, 8), torch.randn(1, 8).expand(tokens, 8)):
            with torch.no_grad():
                expected = model(x).numpy()
                chosen = model.router(x).topk(2).indices.flatten().bincount(minlength=4)
            cut += int((chosen > model.limit(tokens)).sum())
            kept += int((chosen < model.limit(tokens)).sum())
            (got,) = session.run(None, {"x": x.numpy()})
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert cut > 4
    assert kept > 4


class Another(Limited):
    """What is cut is not what is measured."""

    def cut(self, token, slot, limit):
        if token.numel() > limit:
            slot = slot[: limit - 1]
            token = token[: limit - 1]
        return token, slot


class OtherSlot(Limited):
    def cut(self, token, slot, limit):
        return (token[:limit], slot[:limit]) if token.numel() > limit else (token, 1 - slot)


class FromTheEnd(Limited):
    def cut(self, token, slot, limit):
        if token.numel() > limit:
            token, slot = token[-limit:], slot[-limit:]
        return token, slot


class AddsToo(Limited):
    def cut(self, token, slot, limit):
        if token.numel() > limit:
            token, slot = token[:limit], slot[:limit]
            self.experts[0].weight.data += 1
        return token, slot


class OtherLength(Limited):
    def cut(self, token, slot, limit):
        both = torch.cat([token, token])
        if token.numel() > limit:
            both = both[:limit]
        return token, slot + 0 * both.sum()


class Entries(Limited):
    """`numel` counts two of each row."""

    def cut(self, token, slot, limit):
        pairs = torch.stack([token, slot], 1)
        kept = pairs[:limit] if pairs.numel() > limit else pairs
        return kept[:, 0], kept[:, 1]


@pytest.mark.parametrize("module", [Another, OtherSlot, FromTheEnd, AddsToo, OtherLength, Entries])
def test_anything_else_that_asks_for_a_number_of_rows_is_refused(module):
    with pytest.raises(NotExportableError):
        trace(subject_of(module().eval()))
