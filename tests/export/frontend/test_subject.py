"""Modules with named tensors in and out, whatever they take and return."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn

from moe_export.errors import NotExportableError, UsageError


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    aux: torch.Tensor
    nothing: torch.Tensor | None = None
    count: int = 3


@dataclasses.dataclass
class Batch:
    ids: torch.Tensor
    mask: torch.Tensor


class Returns(nn.Module):
    """Returns what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def outputs(tools, function):
    subject = tools.subject(Returns(function), torch.ones(2, 3))
    return subject.outputs, dict(subject.dropped)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x + 1, ("output",)),
        (lambda x: (x + 1,), ("output",)),
        (lambda x: (x + 1, x + 2), ("output_0", "output_1")),
        (lambda x: [x + 1, (x + 2, x + 3)], ("output_0", "output_1.0", "output_1.1")),
        (lambda x: {"a": x + 1, "b.c": x + 2}, ("a", "b.c")),
        (lambda x: {"x": x + 1}, ("output",)),
        (lambda x: {"x": x + 1, "y": x}, ("x_1", "y")),
        (lambda x: Pair(x + 1, x), ("first", "second")),
        (lambda x: {"p": Pair(x, x)}, ("p.first", "p.second")),
        (lambda x: Result(x, x), ("logits", "aux")),
        (lambda x: (x, None, x), ("output_0", "output_2")),
    ],
)
def test_output_names(tools, function, names):
    assert outputs(tools, function)[0] == names


def test_what_is_no_tensor_is_dropped_and_named(tools):
    assert outputs(tools, lambda x: (x + 1, 0, "text", None)) == (
        ("output_0",),
        {"output_1": 0, "output_2": "text"},
    )
    assert outputs(tools, lambda x: Result(x, x)) == (("logits", "aux"), {"count": 3})


def test_returned_variables_give_names(tools):
    class Two(nn.Module):
        def forward(self, x):
            hidden, loss = x + 1, x.sum()
            if x.dim() > 5:
                return hidden, 0
            return hidden, loss

    assert tools.subject(Two(), torch.ones(2, 3)).outputs == ("hidden", "loss")


def test_no_tensor_is_returned(tools):
    with pytest.raises(NotExportableError, match=r"Returns\.forward returns no tensor") as caught:
        outputs(tools, lambda x: 3)
    assert f"where: {__file__}:" in str(caught.value)
    assert caught.value.exit_code == 3


class Takes(nn.Module):
    def forward(self, xs, table=None, flag=False, *rest, scale=1.0, **options):
        total = sum(xs) * scale
        for value in [*rest, *options.values()]:
            total = total + value
        return total if table is None else total + table["a"]["b"]


def test_nested_inputs_are_named_by_their_path(tools):
    one = torch.ones(2, 3)
    subject = tools.subject(Takes(), [one, one], {"a": {"b": one}}, True, one, one, scale=2.5, extra=one)
    assert list(subject.inputs) == ["xs.0", "xs.1", "table.a.b", "rest.0", "rest.1", "extra"]
    assert subject.constants == {"flag": True, "scale": 2.5}
    result = subject.call([one * n for n in range(6)])
    assert torch.equal(result[0], one * (2.5 * 1 + 3 + 4 + 5 + 2))


def test_a_none_in_the_middle_is_neither_input_nor_constant(tools):
    subject = tools.subject(Takes(), [torch.ones(2)], None, False)
    assert list(subject.inputs) == ["xs.0"]
    assert subject.constants == {"flag": False}


def test_named_tuples_and_dataclasses_as_inputs(tools):
    class Sum(nn.Module):
        def forward(self, pair, batch):
            return pair.first + pair.second + batch.ids * batch.mask

    one = torch.ones(2, 3)
    subject = tools.subject(Sum(), Pair(one, one), Batch(one, one))
    assert list(subject.inputs) == ["pair.first", "pair.second", "batch.ids", "batch.mask"]
    tools.equal(tools.graph(Sum(), Pair(one, one), Batch(one, one)), *(torch.randn(5, 3) for _ in range(4)))


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((), {"y": torch.ones(2)}, "missing a required argument: 'input'"),
        ((torch.ones(2), torch.ones(2)), {}, "too many positional arguments"),
        ((torch.ones(2),), {"input": torch.ones(2)}, "multiple values for argument 'input'"),
    ],
)
def test_arguments_that_do_not_fit(tools, args, kwargs, reason):
    with pytest.raises(UsageError) as caught:
        tools.subject(nn.Linear(2, 2), *args, **kwargs)
    said = str(caught.value)
    assert "the example inputs do not fit Linear.forward(input: torch.Tensor) -> torch.Tensor" in said
    assert reason in said
    assert (
        f"where: {tools.subject(nn.ReLU(), torch.ones(2)).source}" in said
    )  # the user's file, not PyTorch's


@pytest.mark.parametrize(
    ("tensor", "reason", "hint"),
    [
        (torch.ones(2, 5), "mat1 and mat2 shapes cannot be multiplied (2x5 and 4x4)", "(2, 5) float32"),
        (torch.ones(2, 4, dtype=torch.int64), "must have the same dtype", "(2, 4) int64"),
    ],
)
def test_forward_that_raises(tools, tensor, reason, hint):
    with pytest.raises(UsageError) as caught:
        tools.subject(nn.Linear(4, 4), tensor)
    assert "Linear.forward raised RuntimeError" in str(caught.value)
    assert reason in str(caught.value)
    assert f"it was called with the example inputs {hint}" in str(caught.value)


def test_forward_that_raises_names_the_users_line(tools):
    def fail(x):
        raise KeyError("lost")

    with pytest.raises(UsageError) as caught:
        tools.subject(Returns(fail), torch.ones(2))
    assert f"where: {__file__}:{fail.__code__.co_firstlineno + 1}" in str(caught.value)


def test_a_model_is_put_into_eval_mode(tools):
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    subject = tools.subject(model, torch.ones(6, 4))
    assert not subject.module.training
    assert torch.equal(*(subject.call([torch.ones(6, 4)])[0] for _ in range(2)))
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_an_in_place_model_does_not_change_the_example(tools):
    class InPlace(nn.Module):
        def forward(self, x):
            x += 1
            return x

    x = torch.zeros(2, 3)
    subject = tools.subject(InPlace(), x)
    assert torch.equal(subject.inputs["x"], torch.zeros(2, 3))
    tools.equal(tools.graph(InPlace(), x), torch.randn(4, 7))


def test_a_tensor_that_requires_grad_is_taken(tools):
    subject = tools.subject(nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True))
    assert not subject.inputs["input"].requires_grad
