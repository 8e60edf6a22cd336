"""Sizes that are a sum of a length that is folded over and of others: `past + L`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.recurrence.recurrences import fold_recurrences
from moe_export.export.tracing.dims import DimRequest


class Behind(nn.Module):
    """A loop over new steps, and what numbers them together with earlier ones."""

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        h, ys = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t])
            ys.append(h)
        count = past.shape[1] + x.shape[1]
        return torch.stack(ys, 1), x.new_ones(count, count).tril().sum(0) + x.new_ones(x.shape[0], count)


@pytest.mark.parametrize(("new", "earlier"), [(3, 11), (14, 2)])
def test_any_number_of_both(new, earlier):
    model = Behind()
    example = (torch.randn(2, 5, 4), torch.randn(2, 7, 4))
    subject = make_subject(model, example, {}, source=Path(__file__), how="a test")
    recurrent = fold_recurrences(subject, DimRequest())
    assert recurrent.lengths, recurrent.notes
    x, past = torch.randn(2, new, 4), torch.randn(2, earlier, 4)
    for wanted, found in zip(model(x, past), recurrent.subject.module(x, past), strict=True):
        torch.testing.assert_close(found, wanted)
