"""A tensor of a trace knows the node that makes it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from canaries import canary
from torch import nn


def test_canary_a_model_that_is_traced_sees_its_nodes():
    with canary(
        "export/torch_compat/proxies.py",
        "get_proxy_slot(tensor, mode.tracer) of torch.fx.experimental.proxy_tensor has the proxy of a tensor",
        todo="see track_tensor in torch/fx/experimental/proxy_tensor.py for where it is kept now",
    ):
        from moe_export.export.torch_compat.proxies import node_of

        seen = []

        class Asks(nn.Module):
            def forward(self, x):
                y = x.exp()
                seen.append(node_of(y))
                return y + 1

        torch.export.export(Asks(), (torch.ones(2),), strict=False)
        assert seen[-1].target is torch.ops.aten.exp.default
        assert node_of(torch.ones(2)) is None


def test_canary_a_trace_notes_the_modules_that_it_is_in():
    with canary(
        "export/torch_compat/proxies.py",
        "a tracer's module_stack keeps a module whose forward raised, and the trace then refuses to go on",
        todo="if it leaves such a module, remove modules_left; else see call_module in torch/fx/_symbolic_trace.py",
    ):
        from moe_export.export.torch_compat.proxies import modules_left

        class Raises(nn.Module):
            def forward(self, x):
                raise ValueError

        class Catches(nn.Module):
            def __init__(self, kept):
                super().__init__()
                self.inner, self.kept = Raises(), kept

            def forward(self, x):
                try:
                    with self.kept():
                        self.inner(x)
                except ValueError:
                    return x + 1

        torch.export.export(Catches(modules_left), (torch.ones(2),), strict=False)
        with pytest.raises(AssertionError, match="Unexpected key"):
            torch.export.export(Catches(nullcontext), (torch.ones(2),), strict=False)
