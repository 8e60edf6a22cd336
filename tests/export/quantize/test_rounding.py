"""Putting weights on a grid: nearest codes, on grids no worse than those of ONNX Runtime's own quantizer."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntimes_quantizer import theirs

from moe_export.errors import UsageError
from moe_export.export.quantize.rounding import rounded
from moe_export.export.quantize.scheme import Scheme

WEIGHT = np.random.default_rng(0).standard_normal((128, 96)).astype(np.float32)


def error(values, weight=WEIGHT):
    return float(np.sqrt(np.square(values - weight).sum() / np.square(weight).sum()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 64])
def test_the_error_is_not_above_that_of_onnxruntimes_quantizer(symmetric, block):
    ours = rounded(WEIGHT, 0, Scheme.of("int4", block, zero_points=not symmetric)).values(0)
    assert error(ours) <= error(theirs(WEIGHT, block, symmetric=symmetric))


@pytest.mark.parametrize(
    ("scheme", "most"),
    [
        (Scheme.of("int4", None), 0.09),
        (Scheme.of("int8", None), 0.009),
        (Scheme.of("int8", 32, zero_points=True), 0.006),
        (Scheme.of("float8e4m3", None), 0.03),
    ],
)
def test_how_far_normal_weights_move(scheme, most):
    assert error(rounded(WEIGHT, 0, scheme).values(0)) < most


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 5),
    st.integers(0, 1),
    st.sampled_from(["int8", "int4"]),
    st.booleans(),
    st.floats(-30, 30),
    st.integers(0, 10**6),
)
def test_every_weight_is_on_the_code_nearest_to_it(size, others, axis, packing, zero_points, power, seed):
    weight = np.random.default_rng(seed).standard_normal((size, others)).astype(np.float32) * 2.0**power
    weight = np.ascontiguousarray(weight if axis == 0 else weight.T).astype(np.float32)
    scheme = Scheme.of(packing, 16, zero_points=zero_points)
    found = rounded(weight, axis, scheme)
    low, high = scheme.bounds
    assert found.codes.shape == weight.shape
    assert found.codes.min() >= low
    assert found.codes.max() <= high
    assert (found.codes == np.rint(found.codes)).all()
    assert (found.scales > 0).all() or scheme.signed
    values = found.values(axis)
    for step in (-1, 1):
        other = np.clip(found.codes + step, low, high)
        moved = replace(found, codes=other).values(axis)
        assert (abs(values - weight) <= abs(moved - weight) * (1 + 1e-4)).all()


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_weights_that_were_quantized_before_come_back_as_they_are(dtype, zero_points):
    """Bit for bit in half precision, whose scales are of that type; up to the last digit in float32."""
    generator = np.random.default_rng(3)
    codes = generator.integers(-8, 8, (128, 40)).astype(np.float32)
    codes += generator.integers(-3, 4, (4, 40)).repeat(32, 0) * zero_points  # any zero point
    scales = (generator.uniform(0.001, 0.1, (4, 40))).astype(dtype).repeat(32, 0)
    weight = (codes * scales.astype(np.float32)).astype(dtype)
    found = rounded(weight, 0, Scheme.of("int4", 32, zero_points=zero_points)).values(0)
    if dtype is np.float32:
        np.testing.assert_allclose(found, weight, rtol=1e-6)
    else:
        assert (found.astype(dtype) == weight).all()


def test_mxfp4_comes_back_in_8_bits():
    """Floats of 4 bits times a power of two, in blocks of 32, are whole numbers up to 12 times half of it."""
    generator = np.random.default_rng(4)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    weight = generator.choice(values, (96, 50)) * generator.choice([-1, 1], (96, 50))
    weight = (weight * (2.0 ** generator.integers(-9, 0, (3, 50))).repeat(32, 0)).astype(ml_dtypes.bfloat16)
    found = rounded(weight, 0, Scheme.of("int8", 32)).values(0)
    assert (found.astype(ml_dtypes.bfloat16) == weight).all()


def test_8_bit_floats_come_back():
    generator = np.random.default_rng(5)
    values = generator.standard_normal((256, 6)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    weight = values * generator.uniform(1e-4, 1e-2, (2, 6)).repeat(128, 0).astype(np.float32)
    found = rounded(weight, 0, Scheme.of("float8e4m3", 128)).values(0)
    np.testing.assert_allclose(found, weight, rtol=1e-6)


def test_a_block_of_zeros_stays_zero():
    for scheme in (Scheme.of("int4", 16), Scheme.of("int4", 16, zero_points=True), Scheme.of("int8", None)):
        assert not rounded(np.zeros((16, 2), np.float32), 0, scheme).values(0).any()


def test_wide_weights_are_rounded_in_strips_as_they_are_at_once(monkeypatch):
    whole = rounded(WEIGHT, 0, Scheme.of("int4", 32))
    monkeypatch.setattr("moe_export.export.quantize.rounding._STRIP", 7 * len(WEIGHT))
    strips = rounded(WEIGHT, 0, Scheme.of("int4", 32))
    assert (whole.codes == strips.codes).all()
    assert (whole.scales == strips.scales).all()


def test_what_no_scheme_is():
    with pytest.raises(UsageError, match="power of two, not 48"):
        Scheme.of("int4", 48)
    with pytest.raises(UsageError, match="8-bit floats lie around zero"):
        Scheme.of("float8e4m3", None, zero_points=True)
    assert Scheme.of("int4", None).block == 32
    assert [Scheme.of(p, b).opset for p, b in (("int8", None), ("int8", 64), ("float8e4m3", None))] == [
        17,
        21,
        19,
    ]
