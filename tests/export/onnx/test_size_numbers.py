"""What a model computes from sizes, at sizes where float32 and division towards zero give other numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn


class Numbers(nn.Module):
    """What a function makes of the number of rows, as sizes and as a factor."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        numbers = self.function(x.shape[0])
        return torch.cat([x.new_full((1,), 1.0) * number for number in numbers])


def _capacities(n):
    return [torch.sym_int(1.05 * n / 4), math.ceil(n / 4 * 1.1), math.ceil(n * (1 / 3)), math.floor(n * 0.7)]


def _whole(n):
    return [-(-n // 8), (3 - n) // 4, (n + 7) & -8, n & 7, n >> 2, n << 1, n // 3]


def _rounded(n):
    return [round(n / 4), round(1.05 * n / 2), round(-n / 2)]


def _factors(n):
    return [n * 0.3, n / 7, n * 1.1 - n]


@pytest.mark.parametrize("function", [_capacities, _whole, _rounded, _factors])
def test_numbers_of_sizes(tools, function):
    """1.05 * 240 / 4 is 63, and 62 in float32; 25 * 1.2 and the like on the other side."""
    graph = tools.graph(Numbers(function), torch.zeros(9, 1))
    for rows in (1, 2, 3, 6, 10, 25, 50, 240, 400, 441):
        tools.equal(graph, torch.zeros(rows, 1))


class Shared(nn.Module):
    """The same number for tensors, where it is of float32, and for sizes, where it is not."""

    def forward(self, x):
        return x * 0.7 + int(x.shape[0] * 0.7) + (x.cumsum(0) < int(x.shape[0] * 1.05 / 4)) * 1.05


def test_a_number_that_tensors_are_computed_with_too(tools):
    graph = tools.graph(Shared(), torch.ones(9, 1))
    for rows in (1, 2, 10, 25, 50, 240, 400, 441):
        tools.equal(graph, torch.ones(rows, 1))
