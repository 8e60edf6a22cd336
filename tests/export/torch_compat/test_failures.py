"""What an error of PyTorch is about is told as it is."""

from __future__ import annotations

import pytest
import torch
from canaries import canary
from torch import nn
from torch.export import Dim

from moe_export.export.torch_compat import failures

FILE = "export/torch_compat/failures.py"


def error_of(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.value


def exported(module, *inputs, dynamic_shapes=None):
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    return torch.onnx.export(program, dynamo=True, verbose=False)


def test_canary_the_node_that_has_no_translation_is_found():
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x + 1)

    with canary(
        FILE,
        "the exporter has the node it translates in a variable `node`, and raises DispatchError for unknown operators",
        todo="see _translate_fx_graph in torch/onnx/_internal/exporter/_core.py: its error may name the node by now",
    ):
        error = error_of(lambda: exported(Bessel(), torch.ones(2)))
        node = failures.untranslated_node(error)
        assert "bessel_j0" in str(node.target)  # it was decomposed
        assert str(node.meta["from_node"][0].target) == "aten.special_bessel_j0.default"
        assert failures.is_unknown_operator(error)
        assert not failures.wants_number(error)


def test_canary_a_size_in_the_place_of_a_number_is_told():
    class OwnKernels(nn.Module):
        def forward(self, x):
            kernels = x.mean((2, 3), keepdim=True).flatten(0, 1)[:, None]
            return nn.functional.conv2d(x.flatten(0, 1)[None], kernels, groups=x.shape[0] * 2)

    with canary(
        FILE,
        "onnxscript speaks of an `attribute type` where a size is given for a number",
        todo="read the text below and match it in `wants_number`",
    ):
        inputs = torch.ones(3, 2, 4, 4)
        error = error_of(lambda: exported(OwnKernels(), inputs, dynamic_shapes=({0: Dim.DYNAMIC},)))
        assert "conv" in str(failures.untranslated_node(error).target)
        assert not failures.is_unknown_operator(error)
        assert failures.wants_number(error), str(list(failures.causes_of(error))[-1])


def test_canary_values_that_decide_are_told():
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    class Counts(nn.Module):
        def forward(self, x):
            return torch.ones(int(x.sum())).reshape(4)

    with canary(
        FILE,
        "an error about values is GuardOnDataDependentSymNode, or says `data-dependent`",
        todo="read the text below and match it in `depends_on_values`",
    ):
        for module, values in ((Branches(), torch.ones(2)), (Counts(), torch.tensor([1, 3]))):
            error = error_of(lambda module=module, values=values: exported(module, values))
            assert failures.depends_on_values(error), str(error)
        assert not failures.depends_on_values(ValueError("shapes do not fit"))


def test_canary_a_size_that_is_fixed_is_told():
    class Four(nn.Module):
        def forward(self, x):
            return x + torch.ones(4)

    with canary(
        FILE,
        "a size that was to be free and is not raises `Constraints violated`",
        todo="read the text below and match it in `fixes_size`",
    ):
        error = error_of(lambda: exported(Four(), torch.ones(4), dynamic_shapes=({0: Dim.DYNAMIC},)))
        assert failures.fixes_size(error), str(error)
        assert not failures.fixes_size(ValueError("shapes do not fit"))
