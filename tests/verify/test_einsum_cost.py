"""FLOPs of einsums are those that a hand counts."""

from __future__ import annotations

import pytest

from moe_export.verify.cost.einsum_cost import einsum_flops


@pytest.mark.parametrize(
    ("equation", "shapes", "flops"),
    [
        ("ij,jk->ik", [(2, 3), (3, 5)], 2 * 2 * 3 * 5),  # a matrix product
        ("ij,jk", [(2, 3), (3, 5)], 2 * 2 * 3 * 5),  # the same, its output as usual
        ("bij, bjk -> bik", [(4, 2, 3), (4, 3, 5)], 2 * 4 * 2 * 3 * 5),
        ("...ij,...jk->...ik", [(4, 2, 3), (4, 3, 5)], 2 * 4 * 2 * 3 * 5),
        ("...ij,jk->...ik", [(7, 4, 2, 3), (3, 5)], 2 * 7 * 4 * 2 * 3 * 5),
        ("bld,dn->bldn", [(2, 3, 4), (4, 5)], 2 * 3 * 4 * 5),  # products only
        ("bld,bln,bld->bldn", [(2, 3, 4), (2, 3, 5), (2, 3, 4)], 2 * (2 * 3 * 4 * 5)),
        ("ij->i", [(2, 3)], 6),  # a sum
        ("ij->ji", [(2, 3)], 0),  # nothing is computed
        ("i,i->", [(3,), (3,)], 6),
        ("ij,jk,kl->il", [(2, 3), (3, 5), (5, 7)], 2 * 2 * 3 * 5 + 2 * 2 * 5 * 7),
        ("ij,ij->ij", [(2, 1), (2, 3)], 6),  # a size of 1 is repeated
    ],
)
def test_flops_of_an_einsum(equation, shapes, flops):
    assert einsum_flops(equation, shapes) == flops
