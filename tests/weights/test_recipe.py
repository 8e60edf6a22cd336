"""Recipes give what NumPy gives, in parts, and know where they are stored as they are used."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from moe_export.errors import UsageError
from moe_export.export.weights import recipe as wr


@pytest.fixture
def stored(tmp_path):
    """A file of 4 x 6 x 5 float16 behind 8 bytes, and its array."""
    array = np.arange(120, dtype=np.float16).reshape(4, 6, 5)
    path = tmp_path / "w.bin"
    path.write_bytes(b"01234567" + array.tobytes())
    return wr.Stored(path, 8, ir.DataType.FLOAT16, (4, 6, 5)), array


def recipes(source, array):
    half, wide = ir.DataType.FLOAT16, ir.DataType.FLOAT
    parts = tuple(wr.Reshaped(wr.Part(source, 0, e, e + 1), (6, 5)) for e in range(4))
    turned = tuple(wr.Transposed(part, (1, 0)) for part in parts)
    return {
        "stored": (source, array),
        "turned": (wr.Transposed(source, (0, 2, 1)), array.transpose(0, 2, 1)),
        "turned first": (wr.Transposed(source, (2, 0, 1)), array.transpose(2, 0, 1)),
        "cast": (wr.Converted(source, wide), array.astype(np.float32)),
        "folded": (wr.Reshaped(source, (24, 5)), array.reshape(24, 5)),
        "unfolded": (wr.Reshaped(source, (2, 2, 6, 5)), array.reshape(2, 2, 6, 5)),
        "part": (wr.Part(source, 1, 2, 5), array[:, 2:5]),
        "rows": (wr.Part(source, 0, 1, 3), array[1:3]),
        "stack": (wr.Stacked(parts), array),
        "stack turned": (wr.Stacked(turned), array.transpose(0, 2, 1)),
        "stack out of order": (wr.Stacked(parts[::-1]), array[::-1]),
        "held": (wr.Held(lambda: array, half, (4, 6, 5)), array),
        "one": (wr.Reshaped(wr.Part(wr.Reshaped(source, (120,)), 0, 7, 8), ()), array.reshape(-1)[7]),
    }


NAMES = [
    "stored", "turned", "turned first", "cast", "folded", "unfolded", "part", "rows", "stack", "stack turned",
    "stack out of order", "held", "one",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_what_numpy_makes(stored, name):
    recipe, right = recipes(*stored)[name]
    assert recipe.shape == right.shape
    assert np.array_equal(recipe.array(), right)
    for axis, size in enumerate(right.shape):
        assert np.array_equal(recipe.read(axis, 1, size), np.take(right, range(1, size), axis))
    pieces = list(recipe.pieces(limit=64))
    assert b"".join(piece.tobytes() for piece in pieces) == np.ascontiguousarray(right).tobytes()
    tensor = wr.RecipeTensor(recipe, "w")
    assert tensor.tobytes() == np.ascontiguousarray(right).tobytes()
    assert tensor.nbytes == right.nbytes


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("stored", (8, 240)),
        ("folded", (8, 240)),
        ("rows", (8 + 60, 120)),
        ("stack", (8, 240)),
        ("one", (8 + 14, 2)),
        ("turned", None),
        ("cast", None),
        ("part", None),
        ("stack turned", None),
        ("stack out of order", None),
        ("held", None),
    ],
)
def test_what_is_used_as_stored_has_a_place(stored, name, place):
    recipe, right = recipes(*stored)[name]
    found = recipe.byte_range()
    assert (None if found is None else (found.offset, found.length)) == place
    if found is not None:
        content = found.file.read_bytes()[found.offset : found.offset + found.length]
        assert content == np.ascontiguousarray(right).tobytes()


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("stored", ()),
        ("turned", ("transposed",)),
        ("cast", ("cast",)),
        ("stack turned", ("transposed", "stacked")),
    ],
)
def test_a_recipe_says_what_is_done(stored, name, steps):
    assert recipes(*stored)[name][0].steps() == steps


def test_large_tensors_come_in_bounded_pieces(stored):
    recipe = wr.Transposed(stored[0], (0, 2, 1))
    assert [piece.nbytes for piece in recipe.pieces(limit=130)] == [120, 120]


def test_what_is_finite_stays_finite_in_half_precision(tmp_path):
    array = np.array([1e30, -1e30, np.inf, 1.0], np.float32)
    (tmp_path / "w").write_bytes(array.tobytes())
    recipe = wr.Converted(
        wr.Stored(tmp_path / "w", 0, ir.DataType.FLOAT, (4,)), ir.DataType.FLOAT16, finite=True
    )
    assert recipe.array().tolist() == [65504.0, -65504.0, np.inf, 1.0]


def test_types_that_numpy_lacks(tmp_path):
    array = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3)
    (tmp_path / "w").write_bytes(array.tobytes())
    recipe = wr.Transposed(wr.Stored(tmp_path / "w", 0, ir.DataType.BFLOAT16, (2, 3)), (1, 0))
    assert np.array_equal(recipe.array(), array.T)


def test_a_file_that_ends_early_is_named(tmp_path):
    (tmp_path / "w").write_bytes(b"123")
    with pytest.raises(UsageError, match="w ends before byte"):
        wr.Stored(tmp_path / "w", 0, ir.DataType.FLOAT, (4,)).array()
