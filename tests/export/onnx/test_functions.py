"""Blocks as functions: the top level shows modules, the graph computes the same, and comes back as it was."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from moe_export.export.frontend.load import load_subject
from moe_export.export.onnx.functions import DOMAIN, as_functions, without_functions
from moe_export.export.pipeline import Options, export_subject


def graph_of(path: str, **options: object) -> ir.Model:
    return export_subject(load_subject(path), Options(gates=False, **options))[0].model


def content(model: ir.Model) -> list[tuple[object, ...]]:
    proto = ir.to_proto(model)
    return sorted(
        (n.op_type, n.name, *n.input, "→", *n.output, str(n.metadata_props)) for n in proto.graph.node
    )


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


@pytest.mark.slow
def test_hybrid_shows_its_blocks_at_the_top():
    model = graph_of("models/hybrid.py")
    inputs = {"input_ids": np.arange(22, dtype=np.int64).reshape(2, 11) % 7}
    before, expected = content(model), run(model, inputs)
    assert as_functions(model) == ()
    calls = [node.op_type for node in model.graph if node.domain == DOMAIN]
    assert calls == ["mamba_norm", "mamba", "attention_norm", "attention", "moe_norm", "moe", "norm"]
    assert len(model.graph) < 20
    functions = {name: function for (_, name, _), function in model.functions.items()}
    assert {"moe.experts", "moe.shared_experts.0"} <= {node.op_type for node in functions["moe"]}
    assert "Scan" in {node.op_type for node in functions["mamba"]}
    assert "in   mamba_norm.mul_1: float[batch, sequence, 32]" in str(functions["mamba"].doc_string)
    for got, wanted in zip(run(model, inputs), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert content(without_functions(model)) == before
    assert DOMAIN not in model.opset_imports


class Crossing(nn.Module):
    """What `inner` computes goes through another module and back into it: neither is in one piece."""

    def __init__(self):
        super().__init__()
        self.inner, self.other = Twice(), Other()

    def forward(self, x):
        first, second = self.inner.start(x), x
        return self.inner(self.other(first)) + second


class Twice(nn.Module):
    def start(self, x):
        return x.sin().cos()

    def forward(self, x):
        return (x.tanh() * 2).exp().log1p()


class Other(nn.Module):
    def forward(self, x):
        return (x.relu() + 1).sqrt() * 3


class Repeated(nn.Module):
    """One module runs twice; a loop over time in another reads what the model made before."""

    def __init__(self):
        super().__init__()
        self.twice, self.steps = Twice(), Steps()

    def forward(self, x):
        scale = x.mean(-1).sigmoid()
        return self.twice(self.steps(self.twice(x), scale))


class Steps(nn.Module):
    def forward(self, x, scale):
        state = torch.zeros_like(x[:, 0])
        out = []
        for t in range(x.shape[1]):
            state = torch.tanh(state * scale[:, :1] + x[:, t])
            out.append(state)
        return torch.stack(out, 1)


class Late(nn.Module):
    """What `steps` reads last is made after its first node has run."""

    def __init__(self):
        super().__init__()
        self.steps = Pair()

    def forward(self, x):
        return self.steps.first(x) + self.steps(x, (x * 3).sin())


class Pair(nn.Module):
    def first(self, x):
        return x.cos()

    def forward(self, x, y):
        return (x.tanh() * y).exp().log1p()


@pytest.mark.parametrize("module", [Crossing(), Repeated(), Late()])
def test_modules_that_run_twice_or_read_one_another(module, tools):
    model = tools.graph(module, torch.randn(2, 5, 4)).model
    x = np.random.default_rng(0).standard_normal((3, 7, 4)).astype(np.float32)
    before, expected = content(model), run(model, {"x": x})
    as_functions(model)
    assert model.functions
    np.testing.assert_array_equal(run(model, {"x": x})[0], expected[0])
    assert content(without_functions(model)) == before
