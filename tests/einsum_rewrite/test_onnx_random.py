"""Random equations as ONNX nodes: many in one model, run by ONNX Runtime against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx_models import compute, integers, model_of, problem
from test_random import problems

from moe_export.einsum_rewrite.onnx_model import Rewriting, rewrite_onnx

BATCH = 50
"""Equations a model: building a session costs more than running an equation."""


def _check(drawn: list[tuple[str, list[list[int]]]], seed: int) -> None:
    several, operands, expected = [], [], []
    for number, (text, full) in enumerate(drawn):
        shapes = [[size or 2 for size in shape] for shape in full]  # empty sizes: test_onnx_equations
        told: list[list[int | str | None]] = [
            # Every other one is dynamic, where a size of 1 is still known to be broadcast.
            [1 if size == 1 else None if (number + seed) % 2 else size for size in shape]
            for shape in shapes
        ]
        several.append(problem(text, told))
        operands.append(integers(shapes, number))
        expected.append(torch.einsum(text, *map(torch.from_numpy, operands[-1])).numpy())
    report = Rewriting()
    opset = (12, 13, 14, 17, 23)[seed % 5]
    model = rewrite_onnx(model_of(several, opset=opset), report=report)
    assert not report.refused
    for (text, shapes), got, want in zip(drawn, compute(model, operands), expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=f"{text} on {shapes}, opset {opset}")


def _batches() -> st.SearchStrategy[list[tuple[str, list[list[int]]]]]:
    return st.lists(problems(), min_size=BATCH, max_size=BATCH)


QUICK = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),  # the message names the equation; shrinking a batch would take minutes
)


@QUICK
@given(_batches(), st.integers(0, 9))
def test_a_thousand_random_equations(drawn: list[tuple[str, list[list[int]]]], seed: int) -> None:
    _check(drawn, seed)


@pytest.mark.slow
@settings(QUICK, max_examples=200)
@given(_batches(), st.integers(0, 9))
def test_ten_thousand_random_equations(drawn: list[tuple[str, list[list[int]]]], seed: int) -> None:
    _check(drawn, seed)
