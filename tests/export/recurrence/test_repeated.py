"""What every iteration computes anew, to read another place of it, is one value in front of the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe_export.export.recurrence.canonicalize import canonicalize
from moe_export.export.recurrence.form import form_of
from moe_export.export.tracing.trace import quiet

aten = torch.ops.aten


class Anew(nn.Module):
    """The whole of x is transposed and squashed in every iteration; y is squashed, and its places are not read."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(4):
            h = h * torch.tanh(y) + torch.sigmoid(x.mT)[:, :, t]
        return h


def operators(module: nn.Module, *inputs: Tensor) -> list[object]:
    with quiet():
        program = torch.export.export(module, inputs).run_decompositions({})
    return [node.target for node in canonicalize(program).nodes if node.op == "call_function"]


def test_a_value_is_made_once_in_front_of_the_iterations_that_read_its_places() -> None:
    names = operators(Anew(), torch.randn(2, 4, 3), torch.randn(2, 3))
    assert names.count(aten.sigmoid.default) == 1
    assert names.count(aten.tanh.default) == 4
    assert names.index(aten.sigmoid.default) < names.index(aten.tanh.default)


def test_random_values_are_values_of_their_own() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.rand_like(x)[t] for t in range(4)])

    assert operators(Noise(), torch.randn(4, 3)).count(aten.rand_like.default) == 4


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({6: 144, 7: 168, 9: 216}, "24 * L"),
        ({6: -13, 7: -15, 9: -19}, "-2 * L - 1"),
        ({24: 6, 32: 8, 48: 12}, "L // 4"),
        ({6: 3, 7: 4, 9: 5}, "(L + 1) // 2"),
    ],
)
def test_numbers_as_functions_of_the_length(values: dict[int, int], text: str) -> None:
    form = form_of(values)
    assert str(form) == text
    assert form is not None
    assert [form.at(length) for length in values] == list(values.values())
