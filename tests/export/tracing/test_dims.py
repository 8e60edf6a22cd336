"""What the user asks of dimensions, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_export.errors import UsageError
from moe_export.export import trace
from moe_export.export.frontend.subject import make_subject
from moe_export.export.tracing.dims import DimRequest, default_name, parse_dynamic

INPUTS = {"x": torch.ones(2, 3, 4), "ids": torch.ones(2, 3, dtype=torch.int64)}


def test_requests():
    request = parse_dynamic(["x:1=sequence,ids:1=sequence", "x:0"], True, INPUTS)
    assert request == DimRequest(True, {("x", 1): "sequence", ("ids", 1): "sequence", ("x", 0): None})
    assert request.wants("x", 1)
    assert not request.wants("x", 2)
    assert parse_dynamic([], False, INPUTS).wants("x", 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "--dynamic 'x' is not input:axis=name"),
        ("x:-1=n", "is not input:axis=name"),
        ("x:1=2n", "is not input:axis=name"),
        ("y:1", "no input 'y'\n  hint: the inputs: x, ids"),
        ("x:3", "x has 3 dimensions, counted from 0\n  hint: its shape is (2, 3, 4)"),
    ],
)
def test_requests_that_make_no_sense(text, said):
    with pytest.raises(UsageError) as caught:
        parse_dynamic([text], False, INPUTS)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "dtype", "names"),
    [
        ((2, 3, 4), torch.float32, ["batch", "sequence", "x_dim2"]),
        ((2, 3), torch.float32, ["batch", "x_dim1"]),
        ((2, 3), torch.int64, ["batch", "sequence"]),
        ((2, 3, 4, 5), torch.float32, ["batch", "x_dim1", "height", "width"]),
        ((2,), torch.float32, ["batch"]),
    ],
)
def test_default_names(shape, dtype, names):
    tensor = torch.ones(shape, dtype=dtype)
    assert [default_name(tensor, axis, "x") for axis in range(len(shape))] == names


def test_a_mask_is_as_long_as_what_it_is_for():
    """Nothing in the code ties them: where a mask is all ones, transformers' models do not look at it."""

    class Counts(torch.nn.Module):
        def forward(self, input_ids, mask, other):
            return input_ids.sum(1) + mask.sum(1) + other.sum(1)

    example = {
        "input_ids": torch.full((2, 5), 3),
        "mask": torch.ones(2, 5, dtype=torch.int64),
        "other": torch.full((2, 5), 4),
    }
    traced = trace(make_subject(Counts(), (), example, source=Path(__file__), how="test"))
    assert traced.inputs["mask"] == traced.inputs["input_ids"] == ("batch", "sequence")
    assert traced.inputs["other"] == ("batch", "other_sequence")


def test_axes_of_one_name_are_one_dimension():
    """Conditions on the two are conditions on the one, so that none names a dimension that no input has."""

    class Pairs(torch.nn.Module):
        def forward(self, pair):
            return pair + torch.einsum("bikc,bjkc->bijc", pair, pair)

    request = DimRequest(True, {("pair", 1): "residues", ("pair", 2): "residues"})
    subject = make_subject(Pairs(), (torch.ones(2, 10, 10, 4),), {}, source=Path(__file__), how="test")
    traced = trace(subject, request)
    assert traced.inputs["pair"] == (2, "residues", "residues", 4)
    assert [dim.name for dim in traced.dims] == ["residues"]
    assert traced.conditions == ()


def test_axes_of_one_name_and_other_sizes_stay_apart():
    class Sums(torch.nn.Module):
        def forward(self, x, y):
            return x.sum(1) + y.sum(1)

    request = DimRequest(True, {("x", 1): "sequence", ("y", 1): "sequence"})
    subject = make_subject(
        Sums(), (torch.ones(2, 5), torch.ones(2, 7)), {}, source=Path(__file__), how="test"
    )
    traced = trace(subject, request)
    assert traced.inputs == {"x": (2, "sequence"), "y": (2, "sequence_1")}
