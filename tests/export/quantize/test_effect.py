"""What packing did to a model, in figures: how far outputs moved, which tokens went elsewhere, which experts moved."""

from __future__ import annotations

import numpy as np
import pytest

from moe_export.comparing.packing_effect import (
    Effect,
    Flips,
    Limits,
    RouterEffect,
    WeightError,
    weight_errors,
)
from moe_export.errors import UsageError
from moe_export.export.quantize.quantize import quantize
from moe_export.export.quantize.scheme import Scheme
from moe_export.verify import FlipBudget

SCORES = np.array([[0.5, 0.3, 0.15, 0.05], [0.4, 0.31, 0.29, 0.0], [0.9, 0.05, 0.03, 0.02]])
EFFECT = Effect(
    "int4, blocks of 32",
    6,
    {"output": 0.031},
    (RouterEffect("layers.1", 200, 3, 0.02, (5,)), RouterEffect("layers.2", 0, 0, 0.0, ())),
    (WeightError("layers.0.up[3]", 0.09), WeightError("layers.1.up[0]", 0.08)),
)


def test_a_token_whose_experts_are_others_is_a_flip_however_they_are_ordered():
    router = Flips("layers.0")
    router.add(np.array([[0, 1], [0, 1], [0, 1]]), np.array([[1, 0], [2, 0], [1, 3]]), SCORES)
    found = router.effect()
    assert (found.tokens, found.flipped, found.unused) == (3, 2, ())
    assert found.gap == pytest.approx(0.9 - 0.02)  # expert 0 was lost, and 3 came in its place


def test_experts_that_no_token_came_to_are_named():
    router = Flips("layers.0")
    router.add(np.array([[0, 1]]), np.array([[0, 1]]), SCORES[:1])
    assert router.effect().unused == (2, 3)


def test_the_lines_of_a_report():
    assert list(EFFECT.lines()) == [
        "packing moves outputs by (root mean square, 6 cases): output 3.10%",
        "weights that packing moves most, of 2: layers.0.up[3] 9.00%, layers.1.up[0] 8.00%",
        "layers.1: 3 of 200 tokens (1.50%) go to other experts, the scores of whose experts were up to 0.02 apart",
        "layers.1: no token came to 1 experts: 5",
        "layers.2: 0 of 0 tokens (0.00%) go to other experts",
    ]


def test_limits():
    assert EFFECT.beyond(Limits()) == ()
    assert EFFECT.beyond(Limits.parse("2%", "0.04")) == ()
    assert EFFECT.beyond(Limits(FlipBudget(0.01), 0.03)) == (
        "output moves by 3.10%, more than --max-error 0.03",
        "3 of 200 tokens of layers.1 go to other experts, more than --max-flips 1%",
    )
    with pytest.raises(UsageError, match="--max-flips is a share or a number of tokens, not 'few'"):
        Limits.parse("few", None)
    with pytest.raises(UsageError, match="--max-error is a share of an output, not '2%'"):
        Limits.parse(None, "2%")


@pytest.mark.parametrize("lowering", ["slices", "loop"])
def test_the_error_of_each_expert_is_told_stacked_or_apart(float_graph, lowering):
    model = float_graph(lowering)
    coarse, fine = (
        weight_errors(quantize(model, Scheme.of("int4", block), "experts")) for block in (None, 16)
    )
    assert len(coarse) == len(fine) == 12  # 3 weights of 4 experts
    assert [one.error for one in fine] == sorted((one.error for one in fine), reverse=True)
    assert 0.03 < fine[0].error < coarse[0].error < 0.12
