"""What code does for an expert that no token chose is nothing, or the model is refused with the line."""

from __future__ import annotations

import linecache

import pytest
import torch
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import make_subject
from moe_export.export.tracing.trace import trace


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        weights, indices = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(indices == number)
            out = self.step(out, x, token, lambda t: expert(x[t]) * weights[t, slot, None])  # noqa: B023
            if out is None:
                break
        return out


class AnyTokens(Loop):
    def step(self, out, x, token, rows):
        if token.numel() > 0:
            out.index_add_(0, token, rows(token))
        return out


class OneAtLeast(Loop):
    def step(self, out, x, token, rows):
        if not token.shape[0] < 1:
            out.index_add_(0, token, rows(token))
        else:
            pass
        return out


class Else(Loop):
    def step(self, out, x, token, rows):
        if token.numel() > 0:
            out.index_add_(0, token, rows(token))
        else:
            out = out + 0.1
        return out


class Leaves(Loop):
    def step(self, out, x, token, rows):
        if token.numel() == 0:
            return out
        return out.index_add(0, token, rows(token))


class Counts(Loop):
    def step(self, out, x, token, rows):
        if token.numel() > 3:
            return out
        return out.index_add(0, token, rows(token))


class TwoAtLeast(Loop):
    def step(self, out, x, token, rows):
        if token.shape[0] >= 2:
            out.index_add_(0, token, rows(token))
        return out


class ListedTokens(Loop):
    def step(self, out, x, token, rows):
        numbers = token.tolist()
        if len(numbers) > 3:
            return out
        return out.index_add(0, token, rows(token))


class FewOfAll(Loop):
    def forward(self, x):
        x = x.flatten(0, 1)
        scores, indices = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(indices == number)
            if token.shape[0] <= x.shape[0] // 2:
                out.index_add_(0, token, expert(x[token]) * scores[token, slot, None])
        return out


class Marked(Loop):
    def forward(self, x):
        _, indices = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = (indices == number).any(-1)
            if not mask.any():
                break
            out[mask] += expert(x[mask])
        return out


class LeavesIfNotIn(Loop):
    def forward(self, x):
        _, indices = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if number not in indices:
                break
            out += expert(x) * (indices == number).any(-1, keepdim=True)
        return out


class ElseNotIn(Loop):
    def forward(self, x):
        _, indices = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if number in indices:
                out += expert(x) * (indices == number).any(-1, keepdim=True)
            else:
                out = out + 0.1
        return out


def traced(tmp_path, module):
    torch.manual_seed(0)
    return trace(make_subject(module, (torch.randn(6, 4),), {}, source=tmp_path / "model.py", how=""))


@pytest.mark.parametrize("module", [AnyTokens(), OneAtLeast()])
def test_code_that_does_nothing_is_traced(tmp_path, module):
    assert traced(tmp_path, module).inputs == {"x": ("batch", 4)}


@pytest.mark.parametrize(
    ("module", "what", "text"),
    [
        (Else(), "computes something for an expert without tokens", "if token.numel() > 0:"),
        (Leaves(), "leaves the loop at an expert without tokens", "if token.numel() == 0:"),
        (Counts(), "asks how many tokens an expert has", "if token.numel() > 3:"),
        (TwoAtLeast(), "asks how many tokens an expert has", "if token.shape[0] >= 2:"),
        (ListedTokens(), "asks how many tokens an expert has", "if len(numbers) > 3:"),
        (Marked(), "leaves the loop at an expert without tokens", "if not mask.any():"),
        (LeavesIfNotIn(), "leaves the loop at an expert without tokens", "if number not in indices:"),
        (ElseNotIn(), "computes something for an expert without tokens", "if number in indices:"),
    ],
)
def test_what_does_something_is_refused_with_the_line(tmp_path, module, what, text):
    with pytest.raises(NotExportableError) as caught:
        traced(tmp_path, module)
    assert what in caught.value.what
    file, _, line = caught.value.where.rpartition(":")
    assert linecache.getline(file, int(line)).strip() == text


def test_a_limit_that_is_a_product_of_free_sizes_is_one(tmp_path):
    torch.manual_seed(0)
    subject = make_subject(FewOfAll(), (torch.randn(3, 2, 4),), {}, source=tmp_path / "model.py", how="")
    with pytest.raises(NotExportableError, match="asks how many tokens an expert has"):
        trace(subject)
