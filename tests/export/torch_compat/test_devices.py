"""A script that names a GPU runs where there is none."""

from __future__ import annotations

import pytest
import torch
from canaries import canary
from torch import nn

from moe_export.export.torch_compat.devices import on_the_cpu

FILE = "export/torch_compat/devices.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_canary_whatever_names_a_gpu_is_on_the_cpu():
    before = torch.cuda.synchronize
    with canary(
        FILE, "a function mode sees `to`, `cuda` and every factory with `device`", todo="catch the new way in"
    ):
        with on_the_cpu():
            model = nn.Linear(2, 2, device="cuda").to("cuda:0").cuda().half()
            made = [
                torch.randn(2, device=torch.device("cuda")),
                torch.ones(2).cuda(0),
                torch.zeros(2).to("cuda", torch.int8),
            ]
            torch.cuda.synchronize()
        assert {tensor.device.type for tensor in [*made, *model.parameters()]} == {"cpu"}
        assert (made[2].dtype, model.weight.dtype) == (torch.int8, torch.float16)
        assert torch.cuda.synchronize is before
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2).cuda()
