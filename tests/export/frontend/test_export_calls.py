"""A script's own export call is the request, whether or not it would succeed."""

from __future__ import annotations

import pytest
from torch import nn

from moe_export.export.frontend.load import load_subject
from moe_export.export.tracing.dims import requested

BLOCK = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, state=None, *, mask=None, scale: float = 2.0):
        h = self.linear(x) * scale
        if state is not None:
            h = h + state["h"]
        return h if mask is None else h.masked_fill(mask[..., None], 0.0)

model = Block()
x, state, mask = torch.randn(2, 5, 4), {"h": torch.zeros(2, 1, 4)}, torch.zeros(2, 5, dtype=torch.bool)
"""
X = {"x": (2, 5, 4)}
ALL = {"x": (2, 5, 4), "state.h": (2, 1, 4), "mask": (2, 5)}


def loaded(write, *lines, header="import torch.onnx\nfrom torch.export import Dim\n"):
    return load_subject(str(write(header + BLOCK + "\n".join(lines) + "\n")))


@pytest.mark.parametrize(
    ("line", "inputs"),
    [
        ("torch.onnx.export(model, (x,), 'm.onnx')", X),
        ("torch.onnx.export(model, x, 'm.onnx', dynamo=False)", X),
        ("torch.onnx.export(model, (x, state, {'mask': mask}), 'm.onnx')", ALL),
        ("torch.onnx.export(model, args=(x, state), kwargs={'mask': mask}, f='m.onnx', dynamo=True)", ALL),
        ("torch.onnx.export(model, (), 'm.onnx', kwargs=dict(x=x))", X),
        ("torch.export.export(model, (x,), {'state': state, 'mask': mask})", ALL),
        ("torch.export.draft_export(model, (x,))", X),
        ("torch.jit.trace(model, x)", X),
        ("torch.jit.trace(model, (x, state))", {"x": (2, 5, 4), "state.h": (2, 1, 4)}),
        ("torch.jit.trace(model, example_kwarg_inputs={'x': x})", X),
        ("torch.jit.script(model)(x)", X),
        (
            "with torch.no_grad():\n    from torch.onnx import export as write_it\n    write_it(model, (x,), 'm')",
            X,
        ),
        ("if __name__ == '__main__':\n    torch.onnx.export(model.half(), (x.half(),), 'm.onnx')", X),
        ("for n in range(3):\n    model(x[:1])\ntorch.onnx.export(model, (x,), 'm.onnx')", X),
    ],
)
def test_the_model_and_its_arguments(write, tmp_path, line, inputs):
    subject = loaded(write, line)
    assert {name: tuple(tensor.shape) for name, tensor in subject.inputs.items()} == inputs
    assert type(subject.module).__name__ == "Block"
    assert {path.suffix for path in tmp_path.iterdir()} == {".py"}  # no file of the script's own call


@pytest.mark.parametrize(
    "line",
    [
        "torch.onnx.export(model, (x[:, :, :3],), 'm.onnx', no_such_option=1) if False else None\nmodel(x)",
        "def never():\n    torch.onnx.export(model, (), 'm.onnx')\nmodel(x)",
    ],
)
def test_an_export_that_is_never_reached_leaves_the_first_call(write, line):
    subject = loaded(write, line)
    assert "first module call" in subject.how
    assert list(subject.inputs) == ["x"]


def test_what_the_exporter_would_refuse_is_a_request_all_the_same(write):
    """A decision on values; free dimensions that the exporter cannot keep free."""
    text = "torch.export.export(model, (x,), dynamic_shapes={'x': {0: Dim('batch', min=2), 2: Dim('width')}})"
    subject = loaded(write, text)
    assert subject.free == {("x", 0): "batch", ("x", 2): "width"}


def test_names_are_those_of_the_call(write):
    text = "torch.onnx.export(model, (x, state), 'm.onnx', input_names=['hidden.states', 'past'], output_names=['y'])"
    subject = loaded(write, text)
    assert list(subject.inputs) == ["hidden.states", "past"]
    assert subject.outputs == ("y",)
    assert subject.free is None  # it says nothing of dimensions, and all of them are free


def test_fewer_names_than_inputs(write):
    subject = loaded(write, "torch.onnx.export(model, (x, state), 'm.onnx', input_names=['first'])")
    assert list(subject.inputs) == ["first", "state.h"]


@pytest.mark.parametrize(
    ("given", "free"),
    [
        ("dynamic_axes={'a': {0: 'batch', 1: 'time'}}", {("a", 0): "batch", ("a", 1): "time"}),
        (
            "dynamic_axes={'a': [0], 'b': {-1: 'width'}, 'out': {0: 'batch'}}",
            {("a", 0): None, ("b", 2): "width"},
        ),
        ("dynamic_shapes={'x': {0: 'batch'}, 'state': None}", {("a", 0): "batch"}),
        ("dynamic_shapes=({0: Dim('n')}, {'h': {0: Dim('n')}})", {("a", 0): "n", ("b", 0): "n"}),
        ("dynamic_shapes={'x': (Dim.AUTO, Dim.STATIC, None), 'state': {'h': None}}", {("a", 0): None}),
        ("dynamic_shapes={'x': {1: 2 * Dim('half'), 0: 2}}", {("a", 1): None}),
        ("dynamic_axes={}", None),
    ],
)
def test_free_dimensions_are_those_of_the_call(write, given, free):
    text = f"torch.onnx.export(model, (x, state), 'm.onnx', input_names=['a', 'b'], {given})"
    subject = loaded(write, text)
    assert subject.free == free
    asked = requested(subject, (), False)
    assert (asked.static, asked.picked) == ((True, free) if free is not None else (False, {}))
    assert requested(subject, ("a:1=time",), False).picked == {
        ("a", 1): "time"
    }  # the command's word goes before
    assert requested(subject, (), True).picked == {}


def test_a_file_that_defines_both_names_exports_as_it_calls(write):
    text = "example_inputs = (x[:1],)\ntorch.onnx.export(model, (x,), 'm.onnx', input_names=['hidden'])"
    assert list(loaded(write, text).inputs) == ["hidden"]


@pytest.mark.parametrize(
    "line",
    ["side = torch.jit.trace(nn.Linear(3, 3), torch.ones(2, 3))", "side = torch.jit.script(nn.Linear(3, 3))"],
)
def test_a_part_that_is_traced_is_not_the_model_that_the_file_names(write, line):
    text = (
        f"{line}\nmodel = nn.Sequential(nn.Linear(4, 2), nn.ReLU())\nexample_inputs = (torch.ones(5, 4),)\n"
    )
    subject = load_subject(write(text))
    assert isinstance(subject.module, nn.Sequential)
    assert subject.how == "`model` and `example_inputs`"


def test_a_model_that_is_named_as_traced_is_the_module_itself(write):
    text = "net = nn.Linear(4, 2)\nexample_inputs = (torch.ones(5, 4),)\nmodel = torch.jit.trace(net, example_inputs)\n"
    assert type(load_subject(write(text)).module) is nn.Linear
