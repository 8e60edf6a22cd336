"""What has no ONNX form is named as the user wrote it, with the line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.onnx.untranslated import untranslated


@torch.library.custom_op("moe_export_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


class Bessel(nn.Module):
    def forward(self, x):
        y = x + 1
        return torch.special.bessel_j0(y)


class Custom(nn.Module):
    def forward(self, x):
        return twice(x) + 1


class Longest(nn.Module):
    def forward(self, x):
        return torch.hypot(x, x)


class Grouped(nn.Module):
    def forward(self, q, k):
        return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def test_attention_without_dropout_draws_nothing(tools):
    """The exporter does not compare numbers of heads that may be any."""
    with pytest.raises(
        NotExportableError, match="attention could not be translated to ONNX: '>' not supported"
    ):
        tools.graph(Grouped(), torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8))


@pytest.mark.parametrize(
    ("module", "operator", "offset", "text"),
    [
        (Bessel(), "aten.special_bessel_j0", 2, "return torch.special.bessel_j0(y)"),
        (Custom(), "moe_export_tests.twice", 1, "return twice(x) + 1"),
        (Longest(), "aten.hypot", 1, "return torch.hypot(x, x)"),
    ],
)
def test_the_operator_and_the_line(tools, module, operator, offset, text):
    with pytest.raises(NotExportableError) as caught:
        tools.graph(module, torch.randn(2, 3))
    line = type(module).forward.__code__.co_firstlineno + offset
    assert str(caught.value) == (
        f"operator {operator} has no ONNX form [MX301]\n"
        f"  where: {__file__}:{line}\n  {text}\n"
        "  hint: write that line with other PyTorch operators"
    )
    assert caught.value.exit_code == 3


def test_an_operator_inside_a_library_names_the_librarys_line(tools):
    module = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    with pytest.raises(NotExportableError) as caught:
        tools.graph(module, torch.randn(2, 4))
    assert "operator aten.matrix_exp has no ONNX form" in str(caught.value)
    assert "parametrizations.py:" in str(caught.value)


def test_an_error_that_names_no_operator():
    error = RuntimeError("the graph is too large\nand more")
    assert str(untranslated(error)).startswith(
        "the model could not be translated to ONNX: the graph is too large [MX301]\n"
    )


def test_a_number_that_a_free_size_decides(tools):
    class OwnKernels(nn.Module):
        def forward(self, x):
            kernels = x.mean((2, 3), keepdim=True)
            return nn.functional.conv2d(
                x.flatten(0, 1)[None], kernels.flatten(0, 1)[:, None], groups=x.shape[0] * 2
            )

    with pytest.raises(
        NotExportableError, match=r"conv2d takes 'groups' as a number, and .* may change"
    ) as caught:
        tools.graph(OwnKernels(), torch.randn(3, 2, 4, 4))
    assert "conv2d(" in caught.value.where
    assert "--static" in caught.value.hint


class RarelyRandom(nn.Module):
    """Random beyond a threshold that the example does not reach."""

    def forward(self, x):
        return torch.zeros_like(x).uniform_() < x


def test_random_numbers_that_the_example_does_not_show(tools):
    with pytest.raises(
        NotExportableError, match=r"aten\.uniform draws random numbers, though the example"
    ) as caught:
        tools.graph(RarelyRandom(), torch.full((2, 3), 7.0))
    line = RarelyRandom.forward.__code__.co_firstlineno + 1
    assert str(caught.value.where).splitlines()[0] == f"{__file__}:{line}"
