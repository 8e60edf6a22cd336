"""The lines that a person would write."""

from __future__ import annotations

import pytest
import torch

from moe_export.einsum_rewrite import plan_einsum, to_python


@pytest.mark.parametrize(
    ("equation", "names", "code"),
    [
        ("b l d_in, d_in n -> b l d_in n", "delta A", "out = delta.unsqueeze(-1) * A"),
        ("bld,bln,bld->bldn", "dt B u", "out = (dt * u).unsqueeze(-1) * B.unsqueeze(2)"),
        ("bnd,bnd->bn", "x y", "out = (x * y).sum(-1)"),
        ("nd,md->nm", "x y", "out = x @ y.transpose(-2, -1)"),
        ("bdn,bn->bd", "h C", "out = (h @ C.unsqueeze(-1)).squeeze(-1)"),
        ("bqhd,bkhd->bhqk", "q k", "out = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)"),
        ("ii->", "x", "out = x.diagonal(dim1=0, dim2=1).sum()"),
        ("ij->", "x", "out = x.sum()"),
        ("aijb->ab", "x", "out = x.sum((1, 2))"),
        ("ij->ij", "x", "out = x"),
        ("sec,ecm->sm", "combine y", "out = combine.flatten(1, -1) @ y.flatten(0, 1)"),
        ("sec,sm->ecm", "dispatch x", "out = dispatch.permute(1, 2, 0) @ x"),
    ],
)
def test_the_code(equation: str, names: str, code: str) -> None:
    assert to_python(plan_einsum(equation, target="torch"), names.split()) == code


def test_a_long_expression_gets_lines_of_its_own() -> None:
    code = to_python(plan_einsum("btkgh,bskh->bkgts", target="torch"), ["query", "key"], "scores")
    *named, last = code.splitlines()
    assert named
    assert all(line.startswith("t") and " = " in line for line in named)
    assert last.startswith("scores = ")


def test_names_of_intermediates_do_not_hide_the_operands() -> None:
    operands = torch.randint(-3, 4, (2, 3, 2, 2, 4)), torch.randint(-3, 4, (2, 5, 2, 4))
    plan = plan_einsum("btkgh,bskh->bkgts", target="torch")
    scope: dict[str, torch.Tensor] = dict(zip(("t1", "t2"), operands, strict=True))
    exec(to_python(plan, ["t1", "t2"], "t3"), scope)
    assert torch.equal(scope["t3"], torch.einsum("btkgh,bskh->bkgts", *operands))


def test_known_sizes_are_written_as_numbers() -> None:
    shapes = (2, 6, 2, 3, 4), (2, 5, 2, 4)
    code = to_python(plan_einsum("btkgh,bskh->bkgts", *shapes, target="torch"), ["q", "k"])
    assert code.endswith(".unflatten(2, (3, 6))")
