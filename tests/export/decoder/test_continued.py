"""Loops of a folded decoder that start from the states that go in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_export.export.decoder.continued import continue_loops
from moe_export.export.frontend.subject import make_subject
from moe_export.export.recurrence.recurrences import fold_recurrences
from moe_export.export.tracing.dims import DimRequest

NAMES = ["x", "past_key_values.0.recurrent_state"]
OUTPUTS = ["y", "present.0.recurrent_state"]


class FromZeros(nn.Module):
    """Starts from zeros, or from a number, whatever it is given."""

    def __init__(self, first: float = 0.0, read: bool = False) -> None:
        super().__init__()
        self.first, self.read = first, read

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        h, ys = x.new_full((x.shape[0], 4), self.first), []
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t])
            ys.append(h)
        return torch.stack(ys, 1) + (past[:, None] if self.read else 0), h


def folded(module: nn.Module) -> nn.Module:
    subject = make_subject(
        module, (torch.randn(2, 7, 4), torch.zeros(2, 4)), {}, source=Path(__file__), how="a test"
    )
    return fold_recurrences(subject, DimRequest()).subject.module


def test_a_loop_starts_from_the_state_that_its_last_one_is_named_after():
    module = folded(FromZeros())
    assert continue_loops(module, NAMES, OUTPUTS, NAMES[1:]) == (NAMES[1],)
    x, zeros = torch.randn(2, 7, 4), torch.zeros(2, 4)
    whole, last = module(x, zeros)
    first, kept = module(x[:, :3], zeros)
    second, end = module(x[:, 3:], kept)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("module", [FromZeros(first=1.0), FromZeros(read=True)], ids=["not zeros", "read"])
def test_other_loops_stay_as_they_are(module):
    assert continue_loops(folded(module), NAMES, OUTPUTS, NAMES[1:]) == ()
