"""`--init` and `--input` as text."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_export.errors import UsageError
from moe_export.export.frontend.arguments import parse_init, parse_input

PLAIN = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("dim=512", ("dim", 512)),
        ("rate=1e-3", ("rate", 1e-3)),
        ("shape=(2, 3)", ("shape", (2, 3))),
        ("bias=False", ("bias", False)),
        ("mode=none", ("mode", "none")),
        ("name=a=b", ("name", "a=b")),
        ("empty=", ("empty", "")),
    ],
)
def test_init(text, pair):
    assert parse_init(text) == pair


@pytest.mark.parametrize("text", ["dim", "=3", "2dim=3", "a.b=1"])
def test_init_that_is_none(text):
    with pytest.raises(UsageError, match="is not name=value"):
        parse_init(text)


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("x=2x10x512", (2, 10, 512), torch.float32),
        ("x=4:bfloat16", (4,), torch.bfloat16),
        ("x=scalar:float64", (), torch.float64),
        ("x=2x3:int8", (2, 3), torch.int8),
        ("x=2:bool", (2,), torch.bool),
        ("x=0x3", (0, 3), torch.float32),
    ],
)
def test_input(text, shape, dtype):
    name, tensor = parse_input(text, PLAIN)
    assert (name, tuple(tensor.shape), tensor.dtype) == ("x", shape, dtype)


@pytest.mark.parametrize(
    "text", ["x", "x=", "x=2x", "x=2x3:float31", "x=-2", "x=2*3", "x y=2", "x=2:float32<", "=2"]
)
def test_input_that_is_none(text):
    with pytest.raises(UsageError) as caught:
        parse_input(text, PLAIN)
    assert f"--input {text!r} is not name=SIZES:dtype" in str(caught.value)
    assert "dtypes: float64, float32" in str(caught.value)


def test_integers_stay_below_their_limit():
    _, tensor = parse_input("ids=100x10:int64<7", PLAIN)
    assert tensor.max() == 6
    assert tensor.min() == 0


def test_token_ids_stay_in_the_smallest_vocabulary():
    model = nn.ModuleList([nn.Embedding(50, 2), nn.Embedding(5, 2)])
    assert parse_input("ids=100x10:int64", model)[1].max() == 4


def test_the_same_text_gives_the_same_tensor():
    assert torch.equal(parse_input("x=2x3", PLAIN)[1], parse_input("x=2x3", PLAIN)[1])
