"""The choices that a plan makes, and how it prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe_export.einsum_rewrite import plan_einsum
from moe_export.einsum_rewrite.layout import Permute, Reshape, Squeeze, Unsqueeze, arrange
from moe_export.einsum_rewrite.steps import MatMul

B, L, D, N = 2, 256, 512, 16


@pytest.mark.parametrize(
    ("equation", "shapes", "steps"),
    [
        ("bld,dn->bldn", [(B, L, D), (D, N)], "unsqueeze, multiply"),
        ("bld,bln,bld->bldn", [(B, L, D), (B, L, N), (B, L, D)], "multiply, unsqueeze, unsqueeze, multiply"),
        ("bnd,bnd->bn", [(B, 64, D)] * 2, "multiply, sum"),
        ("bld,dn->bln", [(B, L, D), (D, N)], "matmul"),
        ("bld,nd->bln", [(B, L, D), (N, D)], "permute, matmul"),
        ("bdn,bn->bd", [(B, D, N), (B, N)], "unsqueeze, matmul, squeeze"),
        ("ij,j->i", [(D, N), (N,)], "unsqueeze, matmul, squeeze"),
        ("i,i->", [(D,), (D,)], "multiply, sum"),
        ("bhqd,bhkd->bhqk", [(B, 8, L, 64)] * 2, "permute, matmul"),
        ("bqhd,bkhd->bhqk", [(B, L, 8, 64)] * 2, "permute, permute, matmul"),
        ("bhqk,bhkd->bhqd", [(B, 8, L, L), (B, 8, L, 64)], "matmul"),
        ("sec,sm->ecm", [(L, 8, 40), (L, D)], "permute, matmul"),
        ("sec,ecm->sm", [(L, 8, 40), (8, 40, D)], "reshape, reshape, matmul"),
        ("bct,nbct->nbt", [(B, N, L), (4, B, N, L)], "multiply, sum"),
        ("ij,k->i", [(D, N), (N,)], "sum, sum, multiply"),
        ("ii->", [(D, D)], "diagonal, sum"),
        ("ij->ij", [(D, N)], "nothing to do"),
        ("ij,kj->ik", [(D, 1), (N, D)], "sum, multiply"),
    ],
)
def test_the_steps(equation: str, shapes: list[tuple[int, ...]], steps: str) -> None:
    assert plan_einsum(equation, *shapes).summary == steps


def test_an_outer_product_is_never_larger_than_the_result() -> None:
    plan = plan_einsum("bclhn,bcshn,bhcls,bcshp->bclhp", (1, 16, 256, 24, 128), (1, 16, 256, 24, 128),
                       (1, 24, 16, 256, 256), (1, 16, 256, 24, 64))  # fmt: skip
    assert plan.largest.number == 1 * 24 * 16 * 256 * 256
    assert plan.largest.number * 4 <= 0.11e9
    assert plan.scaling == 6


def test_transposing_goes_to_the_smaller_operand() -> None:
    plan = plan_einsum("bd,nb->bdn", (8, 64), (16, 8))
    permutes = [step for step in plan.steps if isinstance(step.action, Permute)]
    assert [step.inputs for step in permutes] == [(1,)]


def test_swapping_the_operands_saves_the_transpose_of_the_result() -> None:
    plan = plan_einsum("ij,bj->bi", (5, 7), (3, 7))
    product = next(step for step in plan.steps if isinstance(step.action, MatMul))
    assert product.inputs[0] == 1
    assert plan.result == len(plan.operands) + len(plan.steps) - 1


def test_torch_does_not_broadcast_a_matmul_over_part_of_its_batch() -> None:
    shapes = [(64, 8, 4, 32), (8, 32, 32)]
    assert plan_einsum("bhsd,hde->bhse", *shapes).summary == "matmul"
    torch_plan = plan_einsum("bhsd,hde->bhse", *shapes, target="torch")
    assert torch_plan.summary == "permute, reshape, matmul, reshape, permute"


def test_sizes_may_be_numbers_names_or_unknown() -> None:
    plan = plan_einsum("bld,dn->bldn", ("batch", None, 64), (64, 16))
    assert plan.sizes == {"b": "batch", "l": None, "d": 64, "n": 16}
    assert str(plan.flops) == "1024·batch·l"
    assert plan.flops.number is None
    assert plan_einsum("bld,dn->bldn", (2, 3, 4), (4, 5)).flops.number == 120


def test_it_prints_as_a_table() -> None:
    assert (
        str(plan_einsum("b l d_in, n d_in -> b l n", (2, 256, 512), (16, 512)))
        == """\
b l d_in, n d_in -> b l n
      operand 0  b l d_in
      operand 1  n d_in
   1  permute    d_in n    operand 1
   2  matmul     b l n     operand 0, step 1
  result                (2, 256, 16)
  FLOPs                 8,388,608
  largest intermediate  8,192 elements, 32.8 kB in float32
  scaling               4"""
    )


def test_it_prints_formulas_where_sizes_are_unknown() -> None:
    lines = str(plan_einsum("b l d_in, d_in n -> b l d_in n")).splitlines()
    assert lines[-4:] == [
        "  result                (b, l, d_in, n)",
        "  FLOPs                 b·d_in·l·n",
        "  largest intermediate  b·d_in·l·n elements, 4 B × b·d_in·l·n in float32",
        "  scaling               4",
    ]


def _axes(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(() if axis == "1" else tuple(axis.split("*")) for axis in text.split())


@pytest.mark.parametrize(
    ("start", "goal", "moves"),
    [
        ("a b", "a b", []),
        ("a b", "b a", [Permute((1, 0))]),
        ("a b", "a 1 b", [Unsqueeze((1,))]),
        ("a 1 b", "a b", [Squeeze((1,))]),
        ("a b c", "a b*c", [Reshape()]),
        ("a*b c", "a b c", [Reshape()]),
        ("a 1 b", "1 a b", [Reshape()]),
        ("a 1 b", "b 1 a", [Permute((2, 1, 0))]),
        ("a b c", "c a*b", [Permute((2, 0, 1)), Reshape()]),
        ("a*b c", "c b a", [Reshape(), Permute((2, 1, 0))]),
        ("a*b c", "c 1 a*b", [Reshape(), Permute((2, 0, 1)), Reshape()]),
    ],
)
def test_moves_between_layouts(start: str, goal: str, moves: list[object]) -> None:
    path = arrange(_axes(start), _axes(goal))
    assert [move for move, _ in path] == moves
    assert not path or path[-1][1] == _axes(goal)


def test_planning_imports_neither_torch_nor_opt_einsum() -> None:
    code = (
        "import sys; from moe_export.einsum_rewrite import plan_einsum, to_python;"
        "print(to_python(plan_einsum('b l d_in, d_in n -> b l d_in n'), ['delta', 'A'], ''));"
        "print({'torch', 'onnx', 'opt_einsum', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "delta.unsqueeze(-1) * A\nset()\n"
