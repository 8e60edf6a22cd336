"""A free function is a model."""

from __future__ import annotations

import pytest
import torch

from moe_export.errors import UsageError
from moe_export.export.frontend.load import load_subject

ROUTE = """
from functools import partial

def route(x, weight, k=2):
    scores, chosen = (x @ weight).softmax(-1).topk(k)
    return chosen, scores

example_inputs = (torch.randn(6, 8), torch.randn(8, 4))
"""


def test_a_function_of_tensors(write):
    subject = load_subject(str(write(ROUTE + "model = route\n")))
    assert list(subject.inputs) == ["x", "weight"]
    assert subject.outputs == ("chosen", "scores")
    assert type(subject.module).__name__ == "route"
    assert not subject.constants


def test_a_partial_of_one(write):
    subject = load_subject(str(write(ROUTE + "model = partial(route, k=3)\n")))
    assert subject.call(list(subject.inputs.values()))[0].shape == (6, 3)


@pytest.mark.parametrize(("init", "k"), [((), 2), (("k=3",), 3)])
def test_one_named_on_the_command_line(write, init, k):
    path = write(ROUTE)
    subject = load_subject(f"{path}:route", init=init, inputs=("x=5x8:float32", "weight=8x4:float32"))
    assert subject.call(list(subject.inputs.values()))[0].shape == (5, k)


def test_one_that_a_script_exports(write):
    subject = load_subject(str(write(ROUTE + "torch.jit.trace(route, example_inputs)\n")))
    assert list(subject.inputs) == ["x", "weight"]


def test_a_factory_is_called(write):
    text = "def model():\n    return nn.Linear(3, 2)\nexample_inputs = (torch.ones(1, 3),)\n"
    assert type(load_subject(str(write(text))).module) is torch.nn.Linear


def test_a_factory_named_with_its_arguments_is_called(write):
    path = write("def make(dim):\n    return nn.Linear(dim, 2)\n")
    subject = load_subject(f"{path}:make", init=("dim=3",), inputs=("input=1x3:float32",))
    assert type(subject.module) is torch.nn.Linear


def test_what_it_reads_around_it_is_in_eval_mode_and_its_weights(write):
    text = """
    block, scale = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Parameter(torch.tensor(2.0))

    def model(x):
        return block(x) * scale

    example_inputs = (torch.ones(2, 4),)
    """
    subject = load_subject(str(write(text)))
    assert set(dict(subject.module.named_parameters())) == {"scale", "block.0.weight", "block.0.bias"}
    first, second = (subject.call(list(subject.inputs.values()))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_arguments_that_do_not_fit_it(write):
    with pytest.raises(UsageError, match="do not fit route"):
        load_subject(str(write(ROUTE + "model, example_inputs = route, (torch.ones(2, 8),)\n")))
