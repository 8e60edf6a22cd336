"""The letters of an einsum are those of an einsum that computes the same, with nothing left out."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from moe_export.export.axes.letters import letters_of

EQUATIONS = {
    "td,de->te": ((3, 4), (4, 5)),
    "td, de": ((3, 4), (4, 5)),  # the result is not written: its letters are in the order of the alphabet
    "tb,bA": ((3, 4), (4, 5)),
    "...d,de->...e": ((2, 3, 4), (4, 5)),
    "...d,...d->...": ((2, 3, 4), (3, 4)),  # one has fewer of these axes than the other
    "a...,...b->b...a": ((3, 2, 4), (2, 4, 5)),
    "...d,...d->...d": ((2, 1, 4), (3, 4)),  # one is stretched along the other's rows
    "...,->...": ((3, 4), ()),
    "...d->d": ((2, 3, 4),),
    "i...i": ((3, 2, 3),),
    "ii->i": ((3, 3),),
    "...": ((2, 3),),
    "b...,c...->bc": ((2, 3), (4, 3)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_letters_compute_the_same(equation: str):
    given = [torch.randn(shape, dtype=torch.float64) for shape in EQUATIONS[equation]]

    def program(given: list[torch.Tensor]) -> torch.Tensor:
        return torch.einsum(equation, given)

    graph = make_fx(program, tracing_mode="fake", pre_dispatch=True)(given).graph
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)
    read = letters_of(node)
    assert [len(term) for term in read.terms] == [value.dim() for value in given]
    assert len(read.out) == node.meta["val"].dim()
    assert "." not in "".join((*read.terms, read.out))
    assert read.operands == tuple(graph.find_nodes(op="placeholder"))
    assert read.is_plain is (equation not in ("ii->i", "i...i", "...d,...d->...d"))
    torch.testing.assert_close(torch.einsum(f"{','.join(read.terms)}->{read.out}", given), program(given))
