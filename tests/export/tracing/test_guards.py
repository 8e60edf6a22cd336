"""For which sizes a trace holds, read off the tracer's guards."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Mod, TruncToInt

from moe_export.domain import Condition
from moe_export.export.frontend.subject import make_subject
from moe_export.export.tracing.dims import Dim
from moe_export.export.tracing.guards import conditions_of, printed, simplified
from moe_export.export.tracing.trace import trace

S, T = sympy.symbols("s0 s1", integer=True, positive=True)
NAMES = {"s0": "sequence", "s1": "batch"}
SEQ, BATCH = Dim("sequence", "s0", 10, 1, None), Dim("batch", "s1", 2, 1, None)


@pytest.mark.parametrize(
    ("expression", "sequence", "batch", "value"),
    [
        (S * T, 7, 3, 21),
        (FloorDiv(S + Mod(64 - Mod(S, 64), 64), 64), 65, 1, 2),
        (2 * S - 3 * T - 1, 7, 3, 4),
        (-S, 7, 3, -7),
        (TruncToInt(sympy.Float(1.25) * S), 7, 1, 8),
        (sympy.Max(S, T, 9), 7, 3, 9),
        (S**2, 7, 3, 49),
        (sympy.Rational(1, 2) * S, 8, 1, 4.0),
    ],
)
def test_what_is_printed_has_the_value_of_the_expression(expression, sequence, batch, value):
    text = printed(expression, NAMES)
    assert Condition(f"{text} == {value}").holds({"sequence": sequence, "batch": batch})
    assert not Condition(f"{text} == {value + 1}").holds({"sequence": sequence, "batch": batch})


class Guarded(nn.Module):
    """Goes another way where a condition on its sizes does not hold."""

    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def forward(self, x):
        return 2 * x if self.condition(*x.shape[:2]) else x + 1


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (lambda batch, sequence: batch * sequence > 256, "batch * sequence <= 256"),
        (lambda batch, sequence: batch * sequence * 2 <= 256, "2 * batch * sequence <= 256"),
        (lambda batch, sequence: batch + 9 * sequence > 256, "batch + 9 * sequence <= 256"),
        (lambda batch, sequence: sequence > 48 * batch, "sequence <= 48 * batch"),
        (lambda batch, sequence: 128 * batch * sequence % (1280 * batch) != 0, "sequence % 10 == 0"),
    ],
)
def test_a_guard_on_several_dimensions_is_kept(tmp_path, condition, text):
    traced = trace(make_subject(Guarded(condition), (torch.ones(2, 10, 4),), {}, source=tmp_path, how=""))
    found = conditions_of(traced.program, traced.dims)
    assert [str(each) for each in found] == [text]
    assert not found[0].caution
    for batch, sequence in ((2, 10), (1, 256), (2, 129), (8, 32), (1, 28), (1, 48), (1, 49), (3, 100)):
        assert found[0].holds({"batch": batch, "sequence": sequence}) == (
            condition(batch, sequence) == condition(2, 10)
        )


@pytest.mark.parametrize(
    ("texts", "low", "high", "left"),
    [
        (["sequence <= 64", "64 * ((sequence + 63) // 64) == 64"], 1, 64, []),
        (["sequence > 8", "sequence != 8"], 9, None, []),
        (["sequence % 8 == 0"], 8, None, ["sequence % 8 == 0"]),
        (["sequence % 4 == 0", "sequence % 6 == 0", "sequence < 90"], 12, 84, ["sequence % 12 == 0"]),
        (["sequence % 96 == 0"], 96, None, ["sequence % 96 == 0"]),
        (["sequence % 511 == 3"], 3, None, ["sequence % 511 == 3"]),
        (["sequence % 4 > 0"], 1, None, ["sequence % 4 > 0"]),
        (["sequence % 5 == 0", "sequence <= 3000"], 5, 3000, ["sequence % 5 == 0"]),
        (["sequence <= 65535"], 1, 65535, []),
        (["sequence != 65536"], 1, None, ["sequence != 65536"]),
        (["1 + 3*sequence != 10000"], 1, None, ["1 + 3*sequence != 10000"]),
        (["not 1 + 3*sequence == 10000"], 1, None, ["not 1 + 3*sequence == 10000"]),
        (["3*sequence != 9999", "sequence % 3 == 0"], 3, None, ["sequence % 3 == 0", "3*sequence != 9999"]),
        (["2*sequence != 4001"], 1, None, []),
        (["3*sequence != 2"], 1, None, []),
        (["sequence != 50"], 1, None, ["sequence != 50"]),
        (["sequence == 10"], 10, 10, []),
        ([], 1, None, []),
    ],
)
def test_a_domain_in_few_words(texts, low, high, left):
    (dim,), kept = simplified([Condition(text) for text in texts], [SEQ])
    assert (dim.minimum, dim.maximum, [str(each) for each in kept]) == (low, high, left)


def test_what_follows_from_the_bounds_of_the_others_is_not_said():
    conditions = [
        Condition("sequence <= 64"),
        Condition("batch >= (sequence + 63) // 64"),
        Condition("batch*sequence <= 99"),
    ]
    dims, kept = simplified(conditions, [SEQ, BATCH])
    assert [dim.maximum for dim in dims] == [64, None]
    assert [str(each) for each in kept] == ["batch*sequence <= 99"]


@pytest.mark.parametrize(
    ("several", "left"),
    [
        (["sequence*batch == 16*(sequence // 4)*(batch // 4)"], []),
        (["sequence*batch % 16 == 0", "sequence*batch % 32 == 0"], ["sequence*batch % 32 == 0"]),
        (["sequence // 4 * (batch // (batch // 4)) == sequence"], []),
        (["sequence*batch <= 4096"], ["sequence*batch <= 4096"]),
        (["sequence*batch > 16"], ["sequence*batch > 16"]),
        (["sequence*batch != 576"], ["sequence*batch != 576"]),
        (["sequence*batch != 360000"], ["sequence*batch != 360000"]),
        (["not sequence*batch == 360000"], ["not sequence*batch == 360000"]),
        (["sequence*batch != 15"], []),
        (["batch // 4 == sequence // 4", "batch == sequence"], ["batch == sequence"]),
        (["batch // 4 == sequence // 4"], ["batch // 4 == sequence // 4"]),
        (
            ["sequence + batch == 8", "sequence*batch == 16"],
            ["sequence + batch == 8", "sequence*batch == 16"],
        ),
    ],
)
def test_what_follows_from_simpler_conditions_is_not_said(several, left):
    alone = ["sequence % 4 == 0", "batch % 4 == 0"]
    conditions = [Condition(text) for text in (*several, *alone)]
    dims, kept = simplified(conditions, [SEQ, BATCH])
    assert {str(each) for each in kept} == {*alone, *left}
    for sequence in range(2, 70):
        for batch in range(2, 70):
            sizes = {"sequence": sequence, "batch": batch}
            inside = all(dim.minimum <= sizes[dim.name] for dim in dims)
            assert all(each.holds(sizes) for each in conditions) == (
                inside and all(each.holds(sizes) for each in kept)
            )
