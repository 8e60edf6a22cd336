"""What the tests of packed weights share: a model of experts as a float graph in each lowering, and running graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from moe_export.export import Options
from moe_export.export.frontend.subject import make_subject
from moe_export.export.stages import Model, between, run
from moe_export.export.tracing.dims import DimRequest
from moe_export.verify import OnnxRuntimeRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "models"))
from sparse_moe import SparseMoe

ROWS = np.random.default_rng(0).standard_normal((1, 40, 24)).astype(np.float32)


@pytest.fixture(scope="session")
def program():
    """A block of 4 experts and one shared expert, traced and outlined; no size is a multiple of a block."""
    torch.manual_seed(0)
    module = SparseMoe(24, 37, 4, 2, 1).eval()
    subject = make_subject(module, (torch.from_numpy(ROWS),), {}, source=Path(__file__), how="test")
    return run(between("fold", "outline"), Model.of(subject, DimRequest()), Options())


@pytest.fixture(scope="session")
def float_graph(program):
    """Make the finished float graph at an opset, in a lowering; each once."""
    made = {}

    def float_graph(experts, opset=21):
        if (experts, opset) not in made:
            options = Options(opset=opset, experts=experts, simplify=False)
            made[experts, opset] = run(between("einsums", "order"), program, options).model
        return made[experts, opset]

    return float_graph


@pytest.fixture(scope="session")
def results():
    """Run a graph in onnxruntime, with products in float32."""

    def results(model):
        content = ir.to_proto(model.clone()).SerializeToString()
        return OnnxRuntimeRunner(content).run({"hidden_states": ROWS})

    return results
