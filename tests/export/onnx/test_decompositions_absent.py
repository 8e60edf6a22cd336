"""Operators that ONNX, or its opset 17, has no form for: equal at other sizes than the example's, of odd ones and 1."""

from __future__ import annotations

import pytest
import torch
from slow_cases import one_in
from torch import nn
from torch.nn import functional as F

from moe_export.errors import NotExportableError

TABLE = torch.tensor([-1.0, 0.0, 0.0, 0.5])
BOOK = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


BY_ORDER = {
    "kthvalue": lambda x: (x.kthvalue(3)[0], x.kthvalue(2, 1, True).values),
    "median": lambda x: (x.median(-1)[0], x.median(1, keepdim=True).values, x.median()),
    "searchsorted": lambda x: (
        torch.searchsorted(TABLE, x.round()),
        torch.searchsorted(TABLE, x.round(), side="right", out_int32=True),
        torch.searchsorted(x.sort(-1)[0], x, right=True),
    ),
}
OF_WINDOWS = {
    "glu": lambda x: F.glu(torch.cat([x, x + 1], -1)) + F.glu(torch.cat([x, x + 1], 1), 1),
    "circular": lambda x: (
        F.pad(x, (1, 2), mode="circular"),
        F.pad(x[:, None], (0, 2, 3, 0), mode="circular"),
    ),
    "average": lambda x: F.adaptive_avg_pool1d(x, 4),
    "largest": lambda x: F.adaptive_max_pool1d(x, 4),
}
DISTANCES = {
    "differences": lambda x: torch.cdist(x, x + 1),
    "sums": lambda x: torch.cdist(x, x * 2, p=1.0),
    "products": lambda x: torch.cdist(x @ torch.ones(x.shape[2], 8) * 0.1, BOOK),
}
ALL = {**BY_ORDER, **OF_WINDOWS, **DISTANCES}


@pytest.mark.parametrize("name", one_in(2, list(ALL)))
def test_equal_at_other_sizes(tools, name):
    graph = tools.graph(Calls(ALL[name]), torch.randn(2, 5, 6))
    for shape in ((4, 6, 5), (1, 4, 3), (3, 13, 8)):
        tools.equal(graph, torch.randn(shape))


@pytest.mark.parametrize("pool", [F.adaptive_avg_pool2d, F.adaptive_max_pool2d])
def test_pools_of_images_whose_sizes_the_tracer_fixes(tools, pool):
    """5 rows for 3 windows, 6 columns for 4: windows overlap."""
    graph = tools.graph(Calls(lambda x: pool(x, (3, 4))), torch.randn(2, 4, 5, 6))
    tools.equal(graph, torch.randn(3, 4, 5, 6))


def test_places_of_equal_values_are_refused(tools):
    with pytest.raises(NotExportableError, match="kthvalue has no ONNX form"):
        tools.graph(Calls(lambda x: x.kthvalue(2)), torch.randn(2, 5, 6))


class Solves(nn.Module):
    """A triangular system of each token, well conditioned; what stands in the other triangle is not read."""

    def __init__(self, size, growth, **how):
        super().__init__()
        self.size, self.growth, self.how = size, growth, how

    def forward(self, x):
        rows = x[..., : self.size] * self.growth
        matrix = rows.unsqueeze(-1) * rows.unsqueeze(-2) + 2 * torch.eye(self.size)
        right = x[..., None] if self.how.get("left", True) else x[..., None, :]
        return torch.linalg.solve_triangular(matrix, right, **self.how)


@pytest.mark.parametrize(
    ("size", "how"),
    one_in(
        2,
        [
            (1, {"upper": False}),
            (2, {"upper": True}),
            (7, {"upper": False, "left": False}),
            (8, {"upper": True, "left": False, "unitriangular": True}),
            (9, {"upper": False, "unitriangular": True}),
        ],
    ),
)
def test_a_triangular_system(tools, size, how):
    graph = tools.graph(Solves(size, 0.5, **how), torch.randn(2, 3, size))
    tools.equal(graph, torch.randn(4, 1, size))


def test_a_delta_rule_of_keys_that_are_alike_keeps_its_digits(tools):
    """The powers of its matrix reach 1e17, its inverse holds 0 and +-1."""
    solves = Calls(
        lambda x: torch.linalg.solve_triangular(
            torch.ones(64, 64) * x[:, :1, :1], x, upper=False, unitriangular=True
        )
    )
    graph = tools.graph(solves, torch.randn(2, 64, 3))
    alike = torch.randn(3, 64, 2)
    alike[:, 0, 0] = 1
    tools.equal(graph, alike)


class Chunked(nn.Module):
    """A delta rule over chunks of 8, whose triangular systems PyTorch solves: u and w of arXiv:2406.06484."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Linear(16, 3 * 4 + 1)

    def forward(self, x):
        batch, length, _ = x.shape
        query, key, value, beta = self.parts(x).split([4, 4, 4, 1], -1)
        key, beta, chunks = F.normalize(key, dim=-1), beta.sigmoid(), (length + 7) // 8
        query, key, value, beta = (
            F.pad(each, (0, 0, 0, chunks * 8 - length)).view(batch, chunks, 8, -1)
            for each in (query, key, value, beta)
        )
        system = torch.tril((beta * key) @ key.transpose(-1, -2), -1) + torch.eye(8)
        right = beta * torch.cat([value, key], -1)
        both = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        state, outputs = x.new_zeros(batch, 4, 4), []
        for chunk in range(chunks):
            change = both[:, chunk, :, :4] - both[:, chunk, :, 4:] @ state
            seen = torch.tril(query[:, chunk] @ key[:, chunk].transpose(-1, -2))
            outputs.append(query[:, chunk] @ state + seen @ change)
            state = state + key[:, chunk].transpose(-1, -2) @ change
        return torch.stack(outputs, 1).flatten(1, 2)[:, :length]


@pytest.mark.slow
def test_a_chunked_delta_rule_has_any_length(tools):
    graph = tools.graph(Chunked(), torch.randn(2, 20, 16))
    assert any("folded into one Scan" in note for note in graph.notes)
    for length in (1, 7, 8, 9, 16, 65):
        tools.equal(graph, torch.randn(3, length, 16))
