"""Products of looked-up matrices: the same numbers without a copy for each pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from moe_export.export.tracing.gathered_products import Gathered, looked_up, only_multiplied, product
from moe_export.export.tracing.traced_loops import RunsLoops

STACK, IDS = torch.randn(3, 4, 5), torch.tensor([2, 0, 2, -3, 1, 0, 2])


@pytest.mark.parametrize("first", [True, False])
def test_a_product_with_gathered_matrices(first):
    other = torch.randn(len(IDS), 5, 2) if first else torch.randn(len(IDS), 1, 4)
    gathered = looked_up(STACK, IDS)
    assert isinstance(gathered, Gathered)
    given = (gathered, other) if first else (other, gathered)
    wanted = torch.bmm(STACK[IDS], other) if first else torch.bmm(other, STACK[IDS])
    torch.testing.assert_close(product(*given), wanted)


@pytest.mark.parametrize(
    "ids", [torch.tensor([1]), torch.tensor([[0, 1], [1, 2]]), torch.tensor([True, False, True])]
)
def test_other_entries_are_copied(ids):
    found = looked_up(STACK, ids)
    assert isinstance(found, Tensor)
    assert torch.equal(found, STACK[ids])


class Pairs(nn.Module):
    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor, ids: Tensor, stack: Tensor) -> Tensor:
        chosen = torch.ops.aten.index.Tensor(stack, [ids])
        y = torch.ops.aten.bmm.default(x, chosen)
        return y + chosen.sum() if self.seen else y


@pytest.mark.parametrize("seen", [True, False])
def test_only_what_nothing_else_looks_at(seen):
    module = fx.symbolic_trace(Pairs(seen))
    (node,) = (node for node in module.graph.nodes if node.target is torch.ops.aten.index.Tensor)
    assert only_multiplied(node) is not seen
    given = torch.randn(len(IDS), 1, 4), IDS, STACK
    torch.testing.assert_close(RunsLoops(module).run(*given), Pairs(seen)(*given))
