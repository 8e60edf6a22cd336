"""Equations with an ellipsis: one writing for every number of dimensions that it stands for."""

from __future__ import annotations

import pytest
import torch

from moe_export.einsum_rewrite.codemod import rewrite_file
from moe_export.einsum_rewrite.equation import Equation

HEAD = "import torch\n"
NAMES = "xyzuv"


def rewritten(equation: str) -> str:
    """The expression (and what comes before it) for operands x, y, z, ..."""
    names = ", ".join(NAMES[: len(Equation.parse(equation).inputs)])
    result = rewrite_file(f"{HEAD}out = torch.einsum({equation!r}, {names})\n")
    assert not result.left, result.left
    _, _, *lines = result.code.rstrip("\n").split("\n")
    return "\n".join(lines).removeprefix("out = ")


@pytest.mark.parametrize(
    ("equation", "code"),
    [
        ("...bd,bd->...", "x.flatten(-2) @ y.flatten()"),
        ("...ijk,ijkl->...l", "x.flatten(-3) @ y.flatten(0, 2)"),
        ("...cim,...cmo->...io", "x.transpose(-3, -2).flatten(-2) @ y.flatten(-3, -2)"),
        ("...fsgt,...fsd->...gtd", "product = y.movedim(-1, -3).flatten(-2) @ x.flatten(-2).flatten(-3, -2)\n"
         "out = product.unflatten(-1, (x.shape[-2], x.shape[-1])).movedim(-3, -1)"),
        ("ts...,s->t...", "x.movedim(1, -1) @ y"),
        ("...,n->n...", "(x.unsqueeze(-1) * y).movedim(-1, 0)"),
        ("l...,l...d->...d", "(x.movedim(0, -1).unsqueeze(-2) @ y.movedim(0, -2)).squeeze(-2)"),
        ("a...,b...->ab...", "(x.movedim(0, -1).unsqueeze(-1) * y.movedim(0, -1).unsqueeze(-2))"
         ".movedim((-2, -1), (0, 1))"),
        ("beo,bo...->be...", "(x @ y.unsqueeze(2).flatten(2)).reshape(*x.shape[:2], *y.shape[2:])"),
        ("hbn...c,hcd->hbn...d",
         "(x.unsqueeze(3).flatten(3, -2).flatten(1, 3) @ y).reshape(*x.shape[:-1], y.shape[-1])"),
    ],
)  # fmt: skip
def test_the_lines(equation, code):
    assert rewritten(equation) == code


def test_a_stack_of_weights_is_not_copied_for_every_element_of_the_ellipsis():
    """`(x.unsqueeze(-2) @ w).squeeze(-2)` would be shorter, and `torch.matmul` would copy w for each."""
    assert rewritten("...gi,gio->...go") == (
        "(x.unsqueeze(0).flatten(0, -3).transpose(0, 1) @ y).transpose(0, 1)"
        ".reshape(*x.shape[:-1], y.shape[-1])"
    )


@pytest.mark.parametrize("dots", [(), (2,), (1, 3), (0, 2), (2, 1, 3)])
@pytest.mark.parametrize(
    "equation",
    ["...gi,gio->...go", "l...,l...d->...d", "a...,b...->ab...", "i...j,jk->k...i", "b...c,cb...->...bc", "x...y->..."],
)  # fmt: skip
def test_the_lines_hold_for_every_length(equation, dots):
    sizes = dict(zip("giolabdjkcxy", (2, 3, 4, 3, 2, 3, 2, 4, 3, 5, 2, 3), strict=True))
    parsed = Equation.parse(equation)
    shapes = [
        [size for label in term for size in (dots if label == "..." else (sizes[label],))]
        for term in parsed.inputs
    ]
    operands = [torch.randint(-4, 5, shape) for shape in shapes]
    scope = {"torch": torch} | dict(zip(NAMES, operands, strict=False))
    *before, last = rewritten(equation).split("\n")
    exec("\n".join([*before, f"out = {last.removeprefix('out = ')}"]), scope)
    assert torch.equal(scope["out"], torch.einsum(equation, *operands))


@pytest.mark.parametrize("equation", ["a...,b...->ab...", "l...,l...d->...d", "...i,...i->..."])
def test_ellipses_of_different_lengths_broadcast(equation):
    parsed = Equation.parse(equation)
    for dots in (((), (2, 3)), ((2, 3), (3,)), ((2, 1), (1, 3))):
        shapes = [
            [size for label in term for size in (own if label == "..." else (4,))]
            for term, own in zip(parsed.inputs, dots, strict=True)
        ]
        operands = [torch.randint(-4, 5, shape) for shape in shapes]
        scope = {"torch": torch} | dict(zip(NAMES, operands, strict=False))
        exec(f"out = {rewritten(equation)}", scope)
        assert torch.equal(scope["out"], torch.einsum(equation, *operands))
