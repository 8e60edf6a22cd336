"""Rows of one expert, sliced by counts, are views in the model and stay views in its trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.tracing.trace import trace


def by_out(rows, counts, weights):
    found = torch.empty(rows.shape[0], weights.shape[2])
    for part, into, weight in zip(rows.split(counts), found.split(counts), weights, strict=True):
        torch.mm(part, weight, out=into)
    return found


def by_out_and_bias(rows, counts, weights):
    found = rows.new_empty(len(rows), weights.shape[2])
    parts, into = rows.split(counts), found.split(counts)
    for number, weight in enumerate(weights):
        torch.mm(parts[number], weight, out=into[number])
    for number, weight in enumerate(weights):
        into[number].add_(weight[0])
    return found


def copied_into(rows, counts, weights):
    found = torch.zeros_like(rows)
    for part, into, weight in zip(rows.split(counts), found.split(counts), weights, strict=True):
        into.copy_(part @ weight)
    return found


def in_its_place(rows, counts, weights):
    rows, start = rows.clone(), 0
    for number, count in enumerate(counts):
        part = rows[start : start + count]
        part.mul_(number + 2)
        start = start + count
    return rows


def by_a_column(rows, counts, weights):
    rows = rows.clone()
    for number, part in enumerate(rows.split(counts)):
        part[:, 1:3].fill_(number)
        part[:, 0] = 7
    return rows


def activated(rows, counts, weights):
    rows = rows.clone()
    F.relu(rows.split(counts)[1], inplace=True)
    return rows


def written_around(rows, counts, weights):
    rows = rows.clone()
    parts = rows.split(counts)
    rows.mul_(3)
    rows[:, 0] = 1
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


def written_by_another_slice(rows, counts, weights):
    rows = rows.clone()
    first, second = rows.split(counts), rows.split(counts)
    first[1].add_(1)
    second[1].mul_(2)
    first[2].neg_()
    return torch.cat([a + 10 * b for a, b in zip(first, second, strict=True)]) + rows


def written_by_bounds(rows, counts, weights):
    rows, start, old = rows.clone(), 0, []
    for number, count in enumerate(counts):
        old.append(rows[start : start + count])
        rows[start : start + count] = old[-1] @ weights[number]
        rows[start : start + count, 1] = 5
        rows[start : start + count] += 1
        start = start + count
    return rows + torch.cat(old)


def slices_of_a_view(rows, counts, weights):
    rows = rows.clone()
    for number, part in enumerate(rows[:, 1:].split(counts)):
        part.add_(number)
    rows[:, 2:].neg_()
    return rows


def only_one_is_written(rows, counts, weights):
    rows = rows.clone()
    parts = rows.split(counts)
    kept = parts[0].clone()
    parts[0].zero_()
    return torch.cat([kept, *parts[1:]]) + rows


FORMS = [
    by_out, by_out_and_bias, copied_into, in_its_place, by_a_column, activated, written_around,
    written_by_another_slice, written_by_bounds, slices_of_a_view, only_one_is_written,
]  # fmt: skip


class Sorted(nn.Module):
    """Pairs sorted by expert, three experts, two of them for each token."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.gate = nn.Linear(4, 3)
        self.weights = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        chosen = self.gate(x).topk(2).indices  # (n, k)
        counts = torch.bincount(chosen.flatten(), minlength=3).tolist()
        order = chosen.flatten().argsort(stable=True)
        return self.form(x[order // 2], counts, self.weights)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_what_is_written_into_a_slice_is_written_into_its_source(form):
    torch.manual_seed(0)
    module = Sorted(form).eval()
    subject = make_subject(module, (torch.randn(5, 4),), {}, source=Path(__file__), how="")
    traced = trace(subject).program.module()
    for tokens in (1, 2, 5, 6, 33):
        x = torch.randn(tokens, 4)
        with torch.no_grad():
            torch.testing.assert_close(traced(x)[0], module(x))
