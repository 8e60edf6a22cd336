"""Dtypes: the result has the one that torch.einsum gives, in every kind of step; gradients flow."""

from __future__ import annotations

import pytest
import torch

from moe_export.einsum_rewrite import einsum

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
EQUATIONS = [
    ("ij->i", [(3, 4)]),
    ("ij->", [(3, 4)]),
    ("ij->i", [(3, 1)]),
    ("ii->i", [(3, 3)]),
    ("ij->ji", [(3, 4)]),
    ("ij,ij->ij", [(3, 4)] * 2),
    ("ij,ij->i", [(3, 4)] * 2),
    ("ij,kj->ik", [(3, 4), (2, 4)]),
    ("ij,k->i", [(3, 4), (2,)]),
    ("ij,k->i", [(3, 4), (1,)]),
    ("ij,j->i", [(3, 4), (1,)]),
    ("bij,bjk,bk->bi", [(2, 3, 4), (2, 4, 5), (2, 5)]),
]


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize(("text", "shapes"), EQUATIONS)
def test_like_torch(text: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    operands = [torch.randint(0, 3, shape, generator=generator).to(dtype) for shape in shapes]
    expected = torch.einsum(text, *operands)
    got = einsum(text, *operands)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("text", "shapes"), [("ij,ij->ij", [(3, 4)] * 2), ("ij->i", [(3, 4)]), ("ii->i", [(3, 3)])]
)
def test_bool_where_torch_allows_it(text: str, shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(1)
    operands = [torch.randint(0, 2, shape, generator=generator).bool() for shape in shapes]
    expected = torch.einsum(text, *operands)
    assert torch.equal(einsum(text, *operands), expected)
    assert einsum(text, *operands).dtype == expected.dtype


def test_small_integers_wrap_as_they_do_in_torch() -> None:
    x = torch.full((2, 3), 100, dtype=torch.int8)
    assert torch.equal(einsum("ij,ij->i", x, x), torch.einsum("ij,ij->i", x, x))
    assert torch.equal(einsum("ij,kj->ik", x, x), torch.einsum("ij,kj->ik", x, x))


def test_a_sum_that_widened_one_operand_meets_a_matrix() -> None:
    x, y = torch.ones(3, 4, 2, dtype=torch.int32), torch.ones(5, 4, dtype=torch.int32)
    assert einsum("ijl,kj->ik", x, y).dtype == torch.int64
    assert torch.equal(einsum("ijl,kj->ik", x, y), torch.full((3, 5), 8))


@pytest.mark.parametrize("text", ["...i,...i->...", "b...i,...i->b", "...i,bi->b"])
def test_bfloat16_with_ellipses_of_unequal_rank(text: str) -> None:
    shapes = [(4,), (2, 3, 4)] if text.startswith("...i,...") else [(2, 3, 4), (3, 4)]
    if text == "...i,bi->b":
        shapes = [(2, 3, 4), (5, 4)]
    generator = torch.Generator().manual_seed(1)
    operands = [torch.randint(-2, 3, shape, generator=generator).bfloat16() for shape in shapes]
    expected = torch.einsum(text, *[x.float() for x in operands])
    assert torch.equal(einsum(text, *operands).float(), expected)
    assert einsum(text, *operands).dtype == torch.bfloat16


def test_complex_numbers() -> None:
    x = torch.complex(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]))
    assert torch.equal(einsum("ij,kj->ik", x, x), torch.einsum("ij,kj->ik", x, x))
    assert torch.equal(einsum("ij->i", x), torch.einsum("ij->i", x))


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("bld,bln,bld->bldn", [(2, 3, 4), (2, 3, 5), (2, 3, 4)]),
        ("bqhd,bkhd->bhqk", [(2, 3, 2, 4), (2, 5, 2, 4)]),
    ],
)
def test_gradients_are_those_of_torch(text: str, shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randint(-3, 4, shape, generator=generator).double() for shape in shapes]
    ours, theirs = ([x.clone().requires_grad_() for x in values] for _ in range(2))
    einsum(text, *ours).square().sum().backward()
    torch.einsum(text, *theirs).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_noncontiguous_operands() -> None:
    x = torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1)[::2]
    y = torch.arange(6).reshape(3, 2).T
    for text in ("abc,bc->a", "abc,dc->abd", "abc,bc->cba", "abc->ca"):
        operands = (x, y)[: text.count(",") + 1]
        assert torch.equal(einsum(text, *operands), torch.einsum(text, *operands))
