"""What the tests of the export room share: files to load, modules to export, graphs to run."""

from __future__ import annotations

import itertools
import textwrap
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moe_export.export import Options, export_subject, load_subject, trace
from moe_export.export.frontend.subject import make_subject
from moe_export.export.gates.gate import entering, gate_subject
from moe_export.export.gates.routing import find_routings
from moe_export.export.onnx.simplify import as_numpy
from moe_export.export.pipeline import _gate_graph, _where_it_holds
from moe_export.export.tracing.dims import DimRequest

MODELS = Path(__file__).resolve().parents[2] / "models"
HEADER = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\ntorch.manual_seed(0)\n"
_numbers = itertools.count()


@pytest.fixture
def write(tmp_path):
    """Write a Python file with the usual imports on top, and give its path."""

    def write(text: str, name: str | None = None, header: str = HEADER) -> Path:
        path = tmp_path / (name or f"model_{next(_numbers)}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + textwrap.dedent(text))
        return path

    return write


def subject_of(module, *args, **kwargs):
    """A module and its example arguments, as if they had been loaded from a file."""
    return make_subject(module, args, kwargs, source=Path(__file__), how="test")


def graphs_of(module, *args, opset=17, gates=False, simplify=False, dims=None, **kwargs):
    options = Options(opset=opset, gates=gates, simplify=simplify, dims=dims or DimRequest())
    return export_subject(subject_of(module, *args, **kwargs), options)


def graph_of(module, *args, **options):
    """The graph of the whole model."""
    return graphs_of(module, *args, **options)[0]


def gate_graphs(module, *args):
    """The graphs of a module's gates alone, without that of the module."""
    subject = subject_of(module, *args)
    traced = trace(subject)
    options = Options(simplify=False)
    held = [_where_it_holds(routing, traced) for routing in find_routings(traced)]
    examples = entering(traced, held)
    return [_gate_graph(routing, subject, traced, options, nullcontext, examples) for routing in held]


def run(model, **inputs):
    """Run a graph in onnxruntime on tensors, by input name; arrays by output name."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays = {name: as_numpy(tensor) for name, tensor in inputs.items()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, arrays), strict=True))


@torch.no_grad()
def assert_equal(graph, *inputs, rtol=1e-5, atol=1e-5):
    """The graph computes what the module does, on tensors in the order of the graph's inputs."""
    named = dict(zip(graph.traced.inputs, inputs, strict=True))
    expected = graph.reference.call([tensor.clone() for tensor in inputs])
    found = run(graph.model, **named)
    assert list(found) == list(graph.traced.outputs)
    for name, want in zip(found, expected, strict=False):  # a gate's reference also returns its scores
        array = want.numpy()
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        np.testing.assert_allclose(found[name], array, rtol=rtol, atol=atol, err_msg=name)


def routings_of(module, *args, **kwargs):
    return find_routings(trace(subject_of(module, *args, **kwargs)))


@torch.no_grad()
def assert_gate_equal(graph, eager, *inputs):
    """A gate graph chooses the same experts with the same weights as `eager`, whatever the order."""
    found = run(graph.model, **dict(zip(graph.traced.inputs, inputs, strict=True)))
    indices, weights = (tensor.numpy() for tensor in eager(*inputs))
    order, own = np.argsort(indices, -1), np.argsort(found["topk_idx"], -1)
    assert found["topk_idx"].shape == indices.shape
    np.testing.assert_array_equal(
        np.take_along_axis(found["topk_idx"], own, -1), np.take_along_axis(indices, order, -1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(found["topk_weight"], own, -1),
        np.take_along_axis(weights, order, -1),
        rtol=1e-5,
        atol=1e-6,
    )


class Tools:
    """The functions above, for tests, which cannot import a conftest."""

    subject = staticmethod(subject_of)
    graphs = staticmethod(graphs_of)
    graph = staticmethod(graph_of)
    gates = staticmethod(gate_graphs)
    run = staticmethod(run)
    equal = staticmethod(assert_equal)
    routings = staticmethod(routings_of)
    gate_equal = staticmethod(assert_gate_equal)
    cut = staticmethod(gate_subject)
    models = MODELS


@pytest.fixture(scope="session")
def tools():
    return Tools


@pytest.fixture(scope="session")
def exported():
    """The graphs of a file of models/, exported once a session, at opset 17 with every gate."""
    done = {}

    def export(name):
        if name not in done:
            done[name] = export_subject(load_subject(str(MODELS / f"{name}.py")), Options(opset=17))
        return done[name]

    return export
