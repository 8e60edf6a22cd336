"""Whether an expert mixes rows is decided in float64: how a processor rounds half precision decides nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_export.errors import RefusedError
from moe_export.export.experts.mixing import check_rows


def check(body, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    values = {
        "indices": torch.zeros(6, 2, dtype=torch.int64),
        "x": torch.randn(6, 16, generator=generator).to(dtype),
        "w": torch.randn(16, 8, generator=generator).to(dtype),
    }
    weight = SimpleNamespace(separate=("w",), stack=None)
    experts = SimpleNamespace(indices="indices", slots=2, weights=[weight], shared=["x"], body=body)
    check_rows(experts, values)


class Rounds(nn.Module):
    """A product in float16 that is rounded otherwise for one row than for several, as some processors do."""

    def forward(self, token, slot, zero, x, w):
        y = x[token] @ w
        return y * (1 + 0.002 * (len(token) > 1)) if y.dtype == torch.float16 else y


class Mixes(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, token, slot, zero, x, w):
        y = x[token] @ w
        return y + self.share * y.mean(0)


def test_rounding_is_no_mixing():
    check(Rounds())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [1.0, 1e-6])
def test_mixing_is_seen_however_little(dtype, share):
    with pytest.raises(RefusedError, match="mixes rows"):
        check(Mixes(share), dtype)


def test_what_has_no_float64_is_decided_as_it_is():
    class Narrow(nn.Module):
        def forward(self, token, slot, zero, x, w):
            if x.dtype == torch.float64:
                raise NotImplementedError("no kernel")
            return x[token] @ w

    check(Narrow(), torch.float32)


def test_a_body_that_takes_no_other_rows():
    class Stuck(nn.Module):
        def forward(self, token, slot, zero, x, w):
            raise RuntimeError("five rows only")

    with pytest.raises(RefusedError, match="five rows only"):
        check(Stuck())
