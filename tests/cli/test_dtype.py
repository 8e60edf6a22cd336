"""`--dtype`: every model in half precision is what the model computes, up to flips between experts of one score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from slow_cases import only, slow

from moe_export.comparing.checking import verify_graph
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.engines.build import build_engines
from moe_export.export.onnx.serialize import write_model
from moe_export.export.stages import Draft, between, run
from moe_export.verify import Tolerance

HEADER = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\ntorch.manual_seed(0)\n"
MODELS = Path(__file__).resolve().parents[2] / "models"
NAMES = ["attention", "gshard_moe", "hybrid", "mamba", "mamba2", "moe_gate", "sparse_moe"]
EVERY = [(name, dtype) for name in NAMES for dtype in ("float16", "bfloat16")]
GPUS = {
    "float16": ["sm89"],
    "bfloat16": ["sm86", "sm89", "sm120"],
}  # test_models builds float16 for the others


@pytest.fixture(scope="module")
def exported():
    """The float32 graphs of a model, once for both types: the way to half precision starts at the finished graph."""
    done = {}

    def exported(name):
        if name not in done:
            done[name] = export_subject(load_subject(str(MODELS / f"{name}.py")), Options(target="tensorrt"))
        return done[name]

    return exported


def narrowed(graph, dtype):
    """A finished float32 graph in half precision: the last stage of its way."""
    draft = run(between("precision", "precision"), Draft(graph.program, graph.model), Options(dtype=dtype))
    return replace(graph, model=draft.model, wide=draft.wide, dtype=dtype if draft.wide else "float32")


@pytest.mark.parametrize(
    ("name", "dtype"),
    only([("attention", "float16"), ("moe_gate", "bfloat16")], EVERY),
)
def test_a_model_in_half_precision_is_equal_and_builds(exported, tmp_path, name, dtype):
    for number, wide in enumerate(exported(name)):
        graph = narrowed(wide, dtype)
        assert graph.dtype == (dtype if wide.kind == "model" and name != "moe_gate" else "float32")
        write_model(graph.model, tmp_path / f"{number}.onnx")
        report, _ = verify_graph(graph, tmp_path / f"{number}.onnx", tolerance=Tolerance())
        assert report.verdict == "equal", report
        ranges = {dim.name: (1, 2, 8) if dim.name == "batch" else (16, 64, 256) for dim in graph.traced.dims}
        assert all(engine.size > 10_000 for engine in build_engines(graph.model, GPUS[dtype], ranges))


@pytest.fixture(scope="module")
def wide_moe(tmp_path_factory, texts):
    text = texts["gate"]
    for old, new in (
        (
            "self.gate, self.experts = Gate(),",
            "self.first, self.gate, self.experts = nn.Linear(8, 8), Gate(),",
        ),
        ("indices, weights = self.gate(x)", "x = self.first(x); indices, weights = self.gate(x)"),
    ):
        assert old in text
        text = text.replace(old, new)
    text = text.replace("torch.randn(6, 8)", "torch.randn(600, 8)")
    path = tmp_path_factory.mktemp("moe") / "moe.py"
    path.write_text(HEADER + text)
    (graph,) = export_subject(load_subject(str(path)), Options(gates=False))
    return graph


@pytest.fixture
def moe(wide_moe):
    """A block behind a product: what its gate reads is rounded, so experts of nearly the same score can flip."""
    return narrowed(wide_moe, "bfloat16")


def test_flips_are_counted_and_everything_else_is_judged(moe, tmp_path):
    write_model(moe.model, tmp_path / "moe.onnx")
    report, _ = verify_graph(moe, tmp_path / "moe.onnx", tolerance=Tolerance())
    assert report.verdict == "equal"
    assert report.reference == "torch"  # the graph is told which experts the model took
    assert 0 < report.flips < 600 * len(report.cases) / 20


@pytest.mark.parametrize("wrong", ["weight", "choice", slow("both")])
def test_a_wrong_graph_is_not_equal(moe, tmp_path, wrong):
    """An error in a weight, or a flip that the scores do not excuse, is found, whatever the choices."""
    for value in moe.model.graph.initializers.values():
        array = value.const_value.numpy()
        if array.shape == (8, 8) and value.dtype is ir.DataType.BFLOAT16 and wrong != "choice":
            broken = array.copy()
            broken[0] = -broken[0]
            value.const_value = ir.Tensor(broken, dtype=value.dtype, name=value.name)
        if array.shape in {(4, 8), (8, 4)} and wrong != "weight":
            value.const_value = ir.tensor(np.flip(array, array.shape.index(4)).copy(), name=value.name)
    write_model(moe.model, tmp_path / "moe.onnx")
    report, _ = verify_graph(moe, tmp_path / "moe.onnx", tolerance=Tolerance())
    assert report.verdict == "not equal"


def test_the_command_writes_reports_and_verifies_again(command, write, texts, tmp_path):
    model = write(texts["model"], "block.py")
    done = command(model, "-o", "out", "--dtype", "bfloat16", "--engine", "sm89")
    assert done.code == 0, done.err
    assert "note: bfloat16: " in done.out
    report = json.loads((tmp_path / "out" / "block.report.json").read_text())
    assert report["graphs"][0]["dtype"] == "bfloat16"
    assert report["graphs"][0]["engines"][0]["file"] == "block.sm89.engine"
    again = command("verify", "out/block.onnx", "--against", model, "--dtype", "bfloat16")
    assert again.code == 0, again.out
    assert "rounding to bfloat16 matches torch" in again.out


def test_a_module_is_kept(command, write, texts, tmp_path):
    done = command(
        write(texts["model"], "block.py"), "-o", "out", "--dtype", "float16", "--float32", "linear", "--json"
    )
    assert json.loads(done.out)["graphs"][0]["dtype"] in {"float16", "float32"}
    graph = ir.load(tmp_path / "out" / "block.onnx").graph
    assert {value.dtype.name for value in graph.initializers.values() if value.dtype.is_floating_point()} == {
        "FLOAT"
    }


LOGITS = """
import torch
from torch import nn


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 48)

    def forward(self, ids):
        x = self.table(ids)
        return (x * x.pow(2).mean(-1, keepdim=True).rsqrt()) @ self.table.weight.T


torch.manual_seed(0)
model = Logits()
example_inputs = (torch.randint(0, 64, (2, 7)),)
"""


@pytest.mark.slow
def test_large_outputs_are_judged_by_what_rounding_the_weights_does(command, tmp_path):
    """Logits of 7 on average, some near 0: a few roundings of 1 are too few, and 1 % off is still too much."""
    (tmp_path / "logits.py").write_text(LOGITS)
    done = command("logits.py", "-o", "out", "--dtype", "float16", "--json")
    assert done.code == 0, done.err
    (graph,) = json.loads(done.out)["graphs"]
    assert any(
        "rounding the weights alone moves it by up to" in text for text in graph["verification"]["warnings"]
    )
    (tmp_path / "off.py").write_text(
        LOGITS.replace("x = self.table(ids)", "x = 1.01 * self.table(ids) + 0.02")
    )
    wrong = command("verify", "out/logits.onnx", "--against", "off.py", "--no-localise")
    assert wrong.code == 1, wrong.out
