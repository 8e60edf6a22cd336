"""The proof must be able to fail: plans with one step made wrong are caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
from onnx_models import integers
from test_equations import ROWS, _shapes

from moe_export.einsum_rewrite import plan_einsum
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.layout import Permute
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.planner import make_plan
from moe_export.einsum_rewrite.proof import ProofError, brute_force, prove_onnx, prove_torch
from moe_export.einsum_rewrite.steps import Sum


def _mutants(plan: Plan) -> list[Plan]:
    """A permute turned round, a sum over a neighbouring axis."""
    found = []
    for number, step in enumerate(plan.steps):
        if isinstance(step.action, Permute):
            order = step.action.order
            other: object = Permute((order[-1], *order[:-1]))
        elif isinstance(step.action, Sum) and len(step.layout):
            other = replace(
                step.action, axes=tuple((a + 1) % (len(step.layout) + 1) for a in step.action.axes)
            )
        else:
            continue
        if other != step.action:
            steps = (*plan.steps[:number], replace(step, action=other), *plan.steps[number + 1 :])
            found.append(replace(plan, steps=steps))
    return found


def test_wrong_plans_are_caught() -> None:
    caught = total = 0
    for text, notation in ROWS:
        equation = Equation.parse(text, "einops" if notation == "einops" else "torch")
        for mutant in _mutants(make_plan(equation, _shapes(equation, 0))):
            total += 1
            for prove in (lambda plan: prove_onnx(plan, 17, "here"), lambda plan: prove_torch(plan, "here")):
                try:
                    prove(mutant)
                except ProofError:
                    caught += 1
    assert total > 300
    # The rest sums `aa`-like axes or turns a permute that is its own opposite: the same numbers.
    assert caught / (2 * total) > 0.98, f"{caught} of {2 * total}"


def test_the_brute_force_by_hand() -> None:
    x, y = integers([[2, 3], [1, 4]])
    assert (brute_force(Equation.parse("ij,jk->ik"), [x, y]) == x.sum(1)[:, None] * y).all()
    assert brute_force(Equation.parse("ij->"), [x]) == x.sum()


def test_the_evidence_names_the_sizes() -> None:
    proof = prove_onnx(plan_einsum("ab,b->a"), 12, "here")
    assert str(proof) == (
        "'ab,b->a' as ONNX operators (opset 12): 9 numbers equal, at a=2 b=3; a=3 b=2; a=1 b=3; a=2 b=1"
    ).replace("9 numbers", f"{proof.numbers} numbers")
    assert "a=0 b=3; a=2 b=0" in str(prove_onnx(plan_einsum("ab,b->a"), 17, "here"))


@pytest.mark.parametrize("text", ["ii->i", "ab,bc->ac", "ab,bc,cd->ad"])
def test_one_proof_serves_all_sizes(text: str) -> None:
    equation = Equation.parse(text)
    small, large = ([[n * k for n in s] for s in _shapes(equation, 0)] for k in (1, 4))
    proofs = [prove_onnx(make_plan(equation, shapes), 17, "here") for shapes in (small, large)]
    assert proofs[0] is proofs[1]
