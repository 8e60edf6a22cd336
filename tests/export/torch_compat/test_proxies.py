"""A tensor of a trace knows the node that makes it."""

from __future__ import annotations

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
