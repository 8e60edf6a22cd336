"""Small numbers that a model adds stay in its graph: they are there for the rare case that tests seldom meet."""

from __future__ import annotations

import pytest
import torch
from canaries import canary
from torch import Tensor, nn


class Share(nn.Module):
    """Each score's share, as gates write it."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weights = x.relu()
        return weights / (weights.sum(-1, keepdim=True) + self.eps)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x * 1.000004, x / 0.999997, x - 3e-9, x * 1.0 + 0.0


@pytest.mark.parametrize("eps", [1e-8, 1e-9, 1e-12, 1e-20])
def test_shares_of_nothing_are_nothing(tools, eps):
    graph = tools.graph(Share(eps), torch.randn(3, 4), opset=17)
    tools.equal(graph, torch.tensor([[1.0, 2.0, 0.0, 5.0], [-1.0, -1.0, -2.0, -3.0]]), atol=1e-7)


def test_factors_that_are_nearly_one_stay_and_those_that_are_one_go(tools):
    graph = tools.graph(Scaled(), torch.randn(3, 4), opset=17)
    operators = sorted(node.op_type for node in graph.model.graph.all_nodes())
    assert operators in (["Div", "Identity", "Mul", "Sub"], ["Div", "Mul", "Sub"])
    tools.equal(graph, torch.tensor([[1.0, -2.0, 3.0, 0.0]]), atol=0)


def test_canary_the_matcher_compares_by_a_name_of_its_file():
    with canary(
        "export/torch_compat/exact_rules.py",
        "onnxscript.rewriter._matcher compares constants by `math.isclose`",
        todo="see where SimplePatternMatcher compares constants now; without it `x + 1e-9` becomes `x`, so a share of "
        "nothing is no number",
    ):
        import math

        from onnxscript.rewriter import _matcher

        from moe_export.export.torch_compat.exact_rules import exact_constants

        assert _matcher.math is math
        with exact_constants():
            assert not _matcher.math.isclose(1e-9, 0.0, abs_tol=1e-8)
            assert _matcher.math.isclose(0.1, 0.1, rel_tol=1e-5)
        assert _matcher.math is math
