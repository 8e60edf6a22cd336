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


SCALES = {
    "a power": lambda width: width**-0.5,
    "a root": lambda width: 1 / width**0.5,
    "a ratio": lambda width: 2 / width,
    "of two": lambda width: (width + 3) ** 0.5,
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_float_that_a_free_size_decides_is_a_number_of_the_loop(scale):
    """Where the width is free, its root is a node of the trace; at the other lengths it is a number."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            factor = scale(x.shape[2])
            h, ys = torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                h = torch.tanh(h + x[:, t] * factor)
                ys.append(h)
            return torch.stack(ys, 1) * factor

    model = Scaled()
    subject = make_subject(model, (torch.randn(2, 5, 4),), {}, source=Path(__file__), how="a test")
    recurrent = fold_recurrences(subject, DimRequest())
    assert recurrent.lengths, recurrent.notes
    for length, width in ((1, 4), (5, 1), (13, 9), (3, 64)):
        x = torch.randn(3, length, width)
        torch.testing.assert_close(recurrent.subject.call([x])[0], model(x))


def test_what_a_free_size_decides_in_another_way_at_each_length_is_not_taken_for_one_number():
    class ByLength(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h, ys = torch.zeros_like(x[:, 0]), []
            factor = (x.shape[2] + x.shape[1]) ** -0.5
            for t in range(x.shape[1]):
                h = torch.tanh(h + x[:, t] * factor)
                ys.append(h)
            return torch.stack(ys, 1)

    model = ByLength()
    subject = make_subject(model, (torch.randn(2, 5, 4),), {}, source=Path(__file__), how="a test")
    recurrent = fold_recurrences(subject, DimRequest())
    for length in (5,) if not recurrent.lengths else (1, 5, 13):
        x = torch.randn(3, length, 9 if recurrent.lengths else 4)
        torch.testing.assert_close(recurrent.subject.call([x])[0], model(x))
