"""Rounding by what weights are multiplied with: less error on inputs that were not seen, and never much more."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnxruntimes_quantizer import theirs

from moe_export.export.quantize.feedback import Moments, rounded_with_feedback
from moe_export.export.quantize.rounding import fitted, rounded
from moe_export.export.quantize.scheme import Scheme

K, N = 128, 48
FLOAT32 = np.dtype(np.float32)
DRAW = np.random.default_rng(0)
WEIGHT = DRAW.standard_normal((K, N)).astype(np.float32)
MIXED = DRAW.standard_normal((K, K)) / np.sqrt(1 + np.arange(K))[:, None]
"""What makes of independent numbers inputs in which few directions are large, as a model's are."""
SCHEMES = [
    Scheme.of("int4", 32),
    Scheme.of("int4", 32, zero_points=True),
    Scheme.of("int8", None),
    Scheme.of("float8e4m3", 64),
]


def inputs(count, seed, mixed=MIXED):
    return np.random.default_rng(seed).standard_normal((count, K)) @ mixed


def moments_of(rows):
    found = Moments.none(K)
    for part in np.array_split(rows, 3):
        found.add(part)
    return found


def error(values, rows, weight=WEIGHT):
    """Of a product's output, in float64, as a share of it."""
    exact = rows @ weight.astype(np.float64)
    return float(np.linalg.norm(rows @ values.astype(np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_on_other_inputs_is_less_than_that_of_the_nearest_codes(scheme):
    fed = rounded_with_feedback(WEIGHT, scheme, moments_of(inputs(1000, 1)), FLOAT32)
    nearest = rounded(WEIGHT, 0, scheme)
    unseen = inputs(4000, 2)
    assert error(fed.values(0), unseen) < 0.7 * error(nearest.values(0), unseen)
    low, high = scheme.bounds
    assert low <= fed.codes.min() <= fed.codes.max() <= high
    assert fed.scales.shape == nearest.scales.shape


@pytest.mark.parametrize("symmetric", [True, False])
def test_and_than_that_of_onnxruntimes_quantizer(symmetric):
    scheme = Scheme.of("int4", 32, zero_points=not symmetric)
    fed = rounded_with_feedback(WEIGHT, scheme, moments_of(inputs(1000, 1)), FLOAT32)
    unseen = inputs(4000, 2)
    assert error(fed.values(0), unseen) < 0.7 * error(theirs(WEIGHT, 32, symmetric=symmetric), unseen)


@pytest.mark.parametrize("count", [0, 1, 2, 20, 300])
@pytest.mark.parametrize("mixed", [MIXED, np.eye(K)])
def test_a_few_tokens_do_no_harm(count, mixed):
    """Of inputs that are not correlated at all there is nothing to learn, however many there are."""
    scheme = Scheme.of("int4", 32)
    fed = rounded_with_feedback(WEIGHT, scheme, moments_of(inputs(count, 3, mixed)), FLOAT32)
    unseen = inputs(4000, 2, mixed)
    assert error(fed.values(0), unseen) < 1.04 * error(rounded(WEIGHT, 0, scheme).values(0), unseen)


def test_inputs_of_zeros_leave_the_nearest_codes():
    scheme = Scheme.of("int4", 32)
    fed = rounded_with_feedback(WEIGHT, scheme, moments_of(np.zeros((5, K))), FLOAT32)
    assert (fed.values(0) == rounded(WEIGHT, 0, scheme).values(0)).all()


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_on_a_grid_stay_on_it(kind):
    scheme = Scheme.of("int4", 32)
    weight = rounded(WEIGHT.astype(kind), 0, scheme).values(0).astype(kind)
    fed = rounded_with_feedback(weight, scheme, moments_of(inputs(500, 1)), np.dtype(kind))
    assert (fed.values(0).astype(kind) == weight).all()
    assert fitted(weight, 0, scheme).exact == K // 32 * N


def test_moments_add_up():
    rows = inputs(50, 4)
    found = moments_of(rows)
    np.testing.assert_allclose(found.products, rows.T @ rows, rtol=1e-12, atol=1e-10)
    assert found.tokens == 50
    assert found.fourth == pytest.approx(np.square(np.square(rows).sum(1)).sum())
