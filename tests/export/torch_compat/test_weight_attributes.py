"""What a model's code hung on its weights is read in a trace, in float64, and in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from canaries import canary
from opened import session_of
from torch import nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Options, export_subject
from moe_export.float64 import double_module, in_float64


def product(x, weight):
    """A function that knows nothing of the layer, as libraries of quantized products have it."""
    return x @ (weight.to(x.dtype) * weight.scale * weight.factor).T


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-9, 9, (4, 4), dtype=torch.int8), requires_grad=False)
        self.weight.scale = self.scale = nn.Parameter(torch.rand(4, 1))
        self.weight.factor, self.weight.fast = 0.5, None
        self.register_buffer("steps", torch.arange(4.0))
        self.steps.start = 1.5

    def forward(self, x):
        assert self.weight.fast is None
        self.weight.seen = x  # what a trace sets stays in the trace
        return product(x, self.weight) + self.steps - self.steps.start


def test_canary_a_trace_has_the_attributes_of_weights():
    with canary(
        "export/torch_compat/weight_attributes.py",
        "torch.export swaps weights by NamedMemberAccessor.swap_tensors_dict, which returns what was there before",
        todo="see _reparametrize_module in torch/nn/utils/stateless.py for what it swaps by now",
    ):
        from moe_export.export.torch_compat.weight_attributes import weight_attributes_kept

        model, x = Packed(), torch.randn(3, 4)
        with weight_attributes_kept():
            program = torch.export.export(model, (x,), strict=False)
        assert not hasattr(model.weight, "seen")
        del model.weight.fast, model.weight.factor
        found = program.module()(x)
        model.weight.fast, model.weight.factor = None, 0.5
        torch.testing.assert_close(found, model(x))
        assert "scale" in program.state_dict


def test_the_graph_has_them_and_their_weights():
    torch.manual_seed(0)
    model, x = nn.Sequential(Packed(), nn.ReLU(), Packed()), torch.randn(3, 4)
    subject = make_subject(model, (x,), {}, source=Path(__file__), how="test")
    session = session_of(export_subject(subject, Options())[0].model)
    name = session.get_inputs()[0].name
    for rows in (1, 3, 7):
        x = torch.randn(rows, 4)
        (found,) = session.run(None, {name: x.numpy()})
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_copy_in_float64_has_them_and_its_own_weights():
    torch.manual_seed(0)
    model = Packed()
    wide = double_module(model)
    assert wide.weight.scale is wide.scale
    assert wide.scale.dtype is torch.float64
    assert model.weight.scale is model.scale
    x = torch.randn(3, 4)
    with in_float64(), torch.no_grad():
        found = wide(x.double())
    torch.testing.assert_close(found.float(), model(x))


def test_a_buffer_that_modules_share_is_doubled_wherever_it_stands():
    model = nn.Sequential(Packed(), Packed())
    model[1].steps = model[0].steps
    wide = double_module(model)
    assert [part.steps.dtype for part in wide] == [torch.float64] * 2
    assert [part.steps.start for part in wide] == [1.5] * 2
