"""Whether steps are one run of the model is decided in float64: how half precision is rounded decides nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import make_subject
from moe_export.export.recurrence.step_model import prove_steps
from moe_export.export.tracing.lengths import Length


class Whole(nn.Module):
    """A running sum, which is rounded otherwise in half precision than step by step, as some processors do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = (x * self.weight).cumsum(1)
        return {"y": y * 1.004 if y.dtype in (torch.float16, torch.bfloat16) else y}


class Step(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones(4)), error

    def forward(self, x, past_sum):
        total = past_sum + x[:, 0] * self.weight * (1 + self.error)
        return {"y": total[:, None], "present_sum": total}


def prove(tmp_path, dtype, error):
    torch.manual_seed(0)
    x, past = torch.randn(2, 9, 4, dtype=dtype), torch.zeros(2, 4, dtype=dtype)
    whole = make_subject(Whole().to(dtype), (x,), {}, source=tmp_path, how="")
    step = make_subject(Step(error).to(dtype), (x[:, :1], past), {}, source=tmp_path, how="")
    with torch.no_grad():
        prove_steps(whole, step, {"past_sum": past}, Length((("x", 1),)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_no_difference(tmp_path, dtype):
    prove(tmp_path, dtype, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_small_difference_is_one(tmp_path, dtype):
    with pytest.raises(NotExportableError, match="y has no model of a step"):
        prove(tmp_path, dtype, 2e-5)  # less than float32 was allowed to round, and half precision does
