"""Packed weights as recipes: the bytes of a file, one expert in memory at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from moe_export.export.quantize.packed import Grid, bytes_of, codes_of, scales_of, values_of, zeros_of
from moe_export.export.quantize.scheme import Scheme
from moe_export.export.weights.recipe import Held, Recipe, RecipeTensor

STACK = np.random.default_rng(0).standard_normal((3, 20, 6)).astype(np.float32)


class Counted(Recipe):
    """A stack that notes how many experts are asked for at once."""

    dtype, shape = ir.DataType.FLOAT, STACK.shape

    def __init__(self):
        self.asked = []

    def read(self, axis, start, stop):
        assert axis == 0
        self.asked.append(stop - start)
        return STACK[start:stop]

    def steps(self):
        return ()


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("packing", ["int4", "int8"])
def test_a_file_gets_the_bytes_of_the_tensor_in_memory(packing, zero_points):
    grid = Grid(Counted(), 1, Scheme.of(packing, 16, zero_points=zero_points))
    for recipe in (codes_of(grid), scales_of(grid)):
        in_memory = ir.Tensor(recipe.array(), dtype=recipe.dtype)
        written = b"".join(piece.tobytes() for piece in recipe.pieces())
        assert written == in_memory.tobytes() == RecipeTensor(recipe).tobytes()
        assert len(written) == recipe.nbytes == in_memory.nbytes == RecipeTensor(recipe).nbytes
    assert codes_of(grid).dtype is grid.scheme.stored


def test_one_expert_is_in_float_at_a_time():
    source = Counted()
    grid = Grid(source, 1, Scheme.of("int4", 16, zero_points=True))
    for recipe in (codes_of(grid), scales_of(grid), zeros_of(grid, ir.DataType.UINT4)):
        assert sum(1 for _ in recipe.pieces()) == 3
    assert set(source.asked) == {1}
    assert len(source.asked) == 3  # scales and zero points were kept


def test_codes_stand_for_values():
    grid = Grid(Counted(), 1, Scheme.of("int4", 16))
    codes, scales = codes_of(grid).array().astype(np.float32), scales_of(grid).array()
    values = codes * np.repeat(scales, 16, 1)[:, :20]
    assert (values == values_of(grid).array()).all()
    moved, own = map(sum, zip(*grid.errors(), strict=True))
    assert moved == pytest.approx(np.square(values - STACK, dtype=np.float64).sum())
    assert own == pytest.approx(np.square(STACK, dtype=np.float64).sum())


def test_two_codes_share_a_byte_the_first_in_the_lower_half():
    grid = Grid(Counted(), 1, Scheme.of("int4", 16))
    halves, codes = bytes_of(grid).array(), codes_of(grid).array().astype(np.int64) + 8
    assert halves.shape == (3, 20, 3)
    assert ((halves & 15) == codes[..., ::2]).all()
    assert ((halves >> 4) == codes[..., 1::2]).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_weights_keep_their_type(dtype):
    """What the codes stand for is the product in the weight's own type, as `DequantizeLinear` gives it."""
    weight = (STACK[0] * 0.01).astype(dtype)
    grid = Grid(Held(lambda: weight, ir.tensor(weight).dtype, weight.shape), 0, Scheme.of("int4", 16))
    codes, scales, values = (recipe(grid).array() for recipe in (codes_of, scales_of, values_of))
    assert scales.dtype == values.dtype == np.dtype(dtype)
    assert (values == codes.astype(dtype) * np.repeat(scales, 16, 0)[:20]).all()
    assert abs(values.astype(np.float32) - weight.astype(np.float32)).max() < 0.01
