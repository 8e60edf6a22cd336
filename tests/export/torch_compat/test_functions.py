"""Autograd functions of users are answered in another form while a model is traced."""

from __future__ import annotations

import torch
from canaries import canary
from torch import nn


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Doubles(nn.Module):
    def forward(self, x):
        return Twice.apply(x)


def test_canary_a_trace_goes_through_the_forward_that_is_put_in():
    with canary(
        "export/torch_compat/functions.py",
        "`apply` of a torch.autograd.Function calls the `forward` of its class, also within torch.export",
        todo="see how torch/autograd/function.py and torch.export call it now",
    ):
        from moe_export.export.torch_compat.functions import forwards

        before = Twice.__dict__["forward"]
        with forwards(
            lambda original: lambda context, *xs: xs[0] * 2 if len(xs) == 1 else original(context, *xs)
        ):
            program = torch.export.export(Doubles(), (torch.ones(2),), strict=False)
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets == ["aten.mul.Tensor"]
        assert Twice.__dict__["forward"] is before
