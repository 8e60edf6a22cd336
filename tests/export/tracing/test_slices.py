"""A slice whose bound lies beyond the example is right at every size, and so is the shape that the file declares."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from slow_cases import one_in
from torch import nn

from moe_export.export import Options, export_subject
from moe_export.export.frontend.subject import make_subject

SIZES = (1, 2, 6, 7, 12, 13, 14, 26, 39)  # about the constants, and three times them


def written(x):
    y = x.clone()
    y[:, -13:] = 0
    y[:, :-13] *= 2
    return y


FORMS = {
    "the last": lambda self, x: x[:, -13:],
    "the mean of the last": lambda self, x: x[:, -13:].mean(1),
    "the last of an attribute": lambda self, x: x[:, -self.window :],
    "all but the last": lambda self, x: x[:, :-13],
    "the first": lambda self, x: x[:, :13],
    "all but the first": lambda self, x: x[:, 13:].sum(1),
    "the middle": lambda self, x: x[:, 3:-3],
    "from far": lambda self, x: x[:, 13:-3],
    "up to far": lambda self, x: x[:, 1:-13],
    "between two of the last": lambda self, x: x[:, -13:-3],
    "every third of the last": lambda self, x: x[:, -13::3],
    "none of the last": lambda self, x: x[:, -13:0].sum(1) + x[:, -13:].sum(1),
    "the last turned round": lambda self, x: x[:, -13:].flip(1),
    "the last by position": lambda self, x: x[:, torch.arange(x.shape[1])[-13:]],
    "the last of more": lambda self, x: F.pad(x, (0, 0, 5, 0))[:, -13:],
    "behind an ellipsis": lambda self, x: x.transpose(1, 2)[..., None, -13:],
    "the last are written": lambda self, x: written(x),
}
OTHERS = {
    "split": lambda self, x: x.split(13, 1)[-1],
    "cut off": lambda self, x: F.pad(x, (0, 0, -3, 0)),
    "filled up": lambda self, x: F.pad(x, (0, 0, 0, 13 - x.shape[1])),
    "a kernel": lambda self, x: F.conv1d(F.pad(x.transpose(1, 2), (12, 0)), self.kernel),
    "a kernel without padding": lambda self, x: F.conv1d(F.pad(x.transpose(1, 2), (7, 0)), self.kernel),
}


class Sliced(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.window = form, 13
        self.kernel = nn.Parameter(torch.randn(4, 4, 13))

    def forward(self, x):
        return self.form(self, x)


def exported(tmp_path, form):
    torch.manual_seed(0)
    subject = make_subject(Sliced(form), (torch.randn(2, 7, 4),), {}, source=tmp_path, how="")
    return export_subject(subject, Options(opset=17))[0]


def right_at(graph, module, length):
    """Whether a graph gives what PyTorch does, in the shape that it declares."""
    x = torch.randn(3, length, 4)
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())
    (found,) = session.run(None, {"x": x.numpy()})
    declared = [
        eval(str(size), {"Max": max, "Min": min, "batch": 3, "sequence": length, "x_dim2": 4})
        for size in graph.model.graph.outputs[0].shape
    ]
    wanted = module(x).detach().numpy()
    assert found.shape == wanted.shape == tuple(declared)
    return np.allclose(found, wanted, 1e-5, 1e-6)


def allowed(graph, length):
    (_, fixed, _), sizes = graph.traced.inputs["x"], {"batch": 3, "sequence": length, "x_dim2": 4}
    return fixed in ("sequence", length) and graph.traced.domain.holds(sizes)


@pytest.mark.parametrize("name", one_in(3, FORMS))
def test_a_slice_is_right_at_every_size(tmp_path, name):
    graph = exported(tmp_path, FORMS[name])
    assert all(allowed(graph, length) for length in SIZES)
    assert all(right_at(graph, Sliced(FORMS[name]), length) for length in SIZES)
    computed = [node for node in graph.model.graph if node.op_type in ("Max", "Min", "Sub")]
    assert computed == [] or name == "the last are written"  # the bounds are constants


def folded(x):
    state, collected = x.new_zeros(x.shape[0], 4), []
    for step in range(x.shape[1]):
        state = 0.5 * state + x[:, step].tanh()
        collected.append(state)
    return torch.stack(collected, 1)


BEHIND_A_LOOP = {
    "the last": lambda self, x: folded(x)[:, -13:],
    "all but the last": lambda self, x: folded(x)[:, :-13],
    "the first": lambda self, x: folded(x)[:, :13],
}


@pytest.mark.parametrize("name", one_in(3, BEHIND_A_LOOP))
def test_a_slice_behind_a_folded_loop_is_right_at_every_size(tmp_path, name):
    graph = exported(tmp_path, BEHIND_A_LOOP[name])
    assert "Scan" in [node.op_type for node in graph.model.graph]
    assert all(allowed(graph, length) for length in SIZES)
    assert all(right_at(graph, Sliced(BEHIND_A_LOOP[name]), length) for length in SIZES)


@pytest.mark.parametrize("name", one_in(2, OTHERS))
def test_other_operators_are_right_or_limited(tmp_path, name):
    graph = exported(tmp_path, OTHERS[name])
    module = Sliced(OTHERS[name])
    module.kernel = graph.reference.module.kernel
    for length in SIZES:
        if allowed(graph, length):
            try:
                wanted = module(torch.randn(3, length, 4))
            except RuntimeError:
                continue  # the model itself refuses
            assert right_at(graph, module, length), (length, wanted.shape)
    assert name == "split" or graph.traced.inputs["x"][1] == "sequence"
