"""Half-precision products in float32 are as near to the exact ones as one rounding is, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_export.large import layerwise_products
from moe_export.large.layerwise_products import WideProducts

ENDS = torch.tensor([0, 3, 3, 9, 12], dtype=torch.int32)  # two experts have no row
PRODUCTS = {
    "mm": lambda x, w: x @ w[0],
    "linear": lambda x, w: F.linear(x, w[0].mT.contiguous(), w[1, 0]),
    "linear of (1, 12, 16)": lambda x, w: F.linear(x[None], w[2].mT),
    "bmm": lambda x, w: torch.bmm(x.expand(5, -1, -1), w),
    "grouped": lambda x, w: torch.cat(
        [
            x[start:end] @ w[expert]
            for expert, (start, end) in enumerate(zip([0, *ENDS.tolist()], ENDS.tolist(), strict=False))
        ]
    ),
}


def values(dtype):
    torch.manual_seed(0)
    return torch.randn(12, 16).to(dtype), torch.randn(5, 16, 24).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_one_rounding(name, dtype, monkeypatch):
    monkeypatch.setattr(layerwise_products, "_AT_ONCE", 16 * 7)  # stretches of 7 columns
    x, w = values(dtype)
    exact = PRODUCTS[name](x.double(), w.double())
    with WideProducts():
        found = F.grouped_mm(x, w, offs=ENDS) if name == "grouped" else PRODUCTS[name](x, w)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    off = (found.double() - exact).abs()
    assert (off <= 0.5 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


def test_other_types_are_as_they_were():
    x, w = values(torch.float32)
    with WideProducts():
        assert torch.equal(x @ w[0], torch.mm(x, w[0]))
        found = x @ w[0]
        scaled = torch.addmm(w[1, 0].half(), x.half(), w[0].half(), beta=2)
        with pytest.raises(RuntimeError):
            x.half() @ w[0].bfloat16()
    assert torch.equal(found, x @ w[0])
    assert torch.equal(scaled, torch.addmm(w[1, 0].half(), x.half(), w[0].half(), beta=2))
