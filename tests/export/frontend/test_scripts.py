"""Export scripts as people write them: whatever the script's own call would do, the graph is what it asks for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moe_export.export.frontend.load import load_subject
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.dims import requested

MODEL = """
import torch
import torch.nn as nn


class Net(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.drop = nn.Linear(dim, 3), nn.Dropout(0.5)

    def forward(self, x, scale=None, *, mask=None):
        y = self.drop(self.linear(x))
        y = y if scale is None else y * scale
        y = y if mask is None else y.masked_fill(mask[..., None], 0.0)
        return y
"""
TENSORRT = '''
"""Stands in for the package of that name, with its signatures and none of its GPU code."""
import torch
from torch_tensorrt import dynamo
from torch_tensorrt._input import Input


def compile(module, ir="default", inputs=None, arg_inputs=None, kwarg_inputs=None, enabled_precisions=None, **kwargs):
    raise RuntimeError("no GPU")


def convert_method_to_trt_engine(module, method_name="forward", inputs=None, ir="default", **kwargs):
    raise RuntimeError("no GPU")
'''
TENSORRT_INPUT = """
import enum
import torch


class Input:
    class _ShapeMode(enum.Enum):
        STATIC = 0
        DYNAMIC = 1

    def __init__(self, *args, **kwargs):
        self.shared_dims = kwargs.get("shared_dims", {})
        shape = args[0] if args else kwargs.get("shape")
        self.shape_mode = Input._ShapeMode.STATIC if shape else Input._ShapeMode.DYNAMIC
        keys = ("min_shape", "opt_shape", "max_shape")
        self.shape = tuple(shape) if shape else {key: tuple(kwargs[key]) for key in keys}
        self.torch_tensor = torch.rand(shape or self.shape["opt_shape"]).to(kwargs.get("dtype", torch.float32))
"""
TENSORRT_DYNAMO = """
def compile(exported_program, inputs=None, *, arg_inputs=None, kwarg_inputs=None, **kwargs):
    raise RuntimeError("no GPU")
"""


@dataclass(frozen=True)
class Script:
    """A script, and what it asks for.

    Attributes:
        text: Behind the model's definition.
        inputs: The shape of each input of the graph, by name.
        outputs: Their names.
        free: What it leaves free; None if it does not say.
        fails: Whether its own call fails with this version of PyTorch, or on this machine.
        files: Other files beside it.
        header: What stands in front of it.
    """

    text: str
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"x": (2, 4)})
    outputs: tuple[str, ...] = ("y",)
    free: Mapping[tuple[str, int], str | None] | None = None
    fails: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    header: str = MODEL


X = "x = torch.randn(2, 4)\n"
SCRIPTS: dict[str, Script] = {
    "argparse, a main function, axes by name": Script(
        """
        import argparse

        def parse_args():
            parser = argparse.ArgumentParser()
            parser.add_argument("--output", default="net.onnx")
            parser.add_argument("--opset", type=int, default=13)
            return parser.parse_args()

        def main():
            args = parse_args()
            model = Net().eval()
            torch.onnx.export(
                model, torch.randn(2, 4), args.output, export_params=True, opset_version=args.opset,
                do_constant_folding=True, input_names=["input"], output_names=["output"],
                dynamic_axes={"input": {0: "batch_size"}, "output": {0: "batch_size"}},
            )
            print(f"saved {args.output}")

        if __name__ == "__main__":
            main()
        """,
        {"input": (2, 4)},
        ("output",),
        {("input", 0): "batch_size"},
    ),
    "axes as a list, then the checker, onnxruntime and a comparison": Script(
        X
        + """
model = Net().eval()
with torch.no_grad():
    wanted = model(x)
    torch.onnx.export(model, x, "net.onnx", input_names=["image"], output_names=["scores"], dynamic_axes={"image": [0]})
import onnx, onnxruntime, numpy
onnx.checker.check_model(onnx.load("net.onnx"))
session = onnxruntime.InferenceSession("net.onnx")
numpy.testing.assert_allclose(session.run(None, {"image": x.numpy()})[0], wanted, rtol=1e-3)
""",
        {"image": (2, 4)},
        ("scores",),
        {("image", 0): None},
    ),
    "onnxsim behind it, trtexec in a subprocess": Script(
        X
        + """
import subprocess
torch.onnx.export(Net(), (x,), "net.onnx", opset_version=17)
import onnx, onnxsim
onnx.save(onnxsim.simplify(onnx.load("net.onnx"))[0], "net.sim.onnx")
subprocess.run(["trtexec", "--onnx=net.sim.onnx", "--saveEngine=net.engine", "--fp16"], check=True)
""",
    ),
    "a dict at the end of the arguments": Script(
        X
        + "torch.onnx.export(Net(), (x, {'mask': torch.zeros(2, dtype=torch.bool)}), 'net.onnx', dynamo=False)\n",
        {"x": (2, 4), "mask": (2,)},
    ),
    "keyword arguments, dimensions as objects": Script(
        X
        + """
from torch.export import Dim
batch = Dim("batch", min=1, max=64)
torch.onnx.export(
    Net(), (x,), "net.onnx", kwargs={"scale": torch.ones(2, 1)}, dynamo=True,
    dynamic_shapes={"x": {0: batch}, "scale": {0: batch}},
)
""",
        {"x": (2, 4), "scale": (2, 1)},
        free={("x", 0): "batch", ("scale", 0): "batch"},
    ),
    "dimensions that PyTorch finds, the program saved afterwards": Script(
        X
        + """
Dim = torch.export.Dim
program = torch.onnx.export(Net(), (x,), dynamo=True, dynamic_shapes=({0: Dim.AUTO, 1: Dim.STATIC},))
program.optimize()
program.save("net.onnx")
""",
        free={("x", 0): None},
    ),
    "in a function of another file, behind a trial": Script(
        X
        + "from my_exporting import to_onnx\nmodel = Net()\nprint(model(x).shape)\nto_onnx(model, x, 'net.onnx')\n",
        {"data": (2, 4)},
        ("result",),
        {("data", 0): "n"},
        files={
            "my_exporting.py": """
            import torch

            def to_onnx(model, x, path):
                model.eval()
                names = dict(input_names=["data"], output_names=["result"])
                torch.onnx.export(model, (x,), path, **names, dynamic_axes={"data": {0: "n"}})
        """
        },
    ),
    "half precision on a GPU": Script(
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = Net().to("cuda").half().eval()
        x = torch.randn(2, 4, device="cuda").half()
        torch.cuda.synchronize()
        torch.onnx.export(model.cuda(), x.to(device), "net.onnx")
        """,
        fails=True,
    ),
    "a trace that is exported": Script(
        X
        + """
traced = torch.jit.trace(Net().eval(), x, check_trace=False)
traced = torch.jit.freeze(traced)
assert traced(x).shape == (2, 3)
torch.onnx.export(traced, x, "net.onnx", input_names=["input"], dynamic_axes={"input": {0: "batch"}})
traced.save("net.pt")
""",
        {"input": (2, 4)},
        free={("input", 0): "batch"},
    ),
    "a trace that is saved": Script(
        X + "traced = torch.jit.trace(Net(), (x,))\ntraced.save('net.pt')\ntorch.jit.load('net.pt')\n"
    ),
    "a scripted module": Script(
        X + "torch.onnx.export(torch.jit.script(Net()), (x,), 'net.onnx')\n", fails=True
    ),
    "a program that is exported further": Script(
        X
        + """
rows = torch.export.Dim("rows")
program = torch.export.export(Net(), (x,), dynamic_shapes={"x": {0: rows}, "scale": None, "mask": None})
program = program.run_decompositions()
print(program.module()(x), program.graph)
torch.onnx.export(program, f="net.onnx", input_names=["rows_of_x"])
""",
        {"rows_of_x": (2, 4)},
        free={("rows_of_x", 0): "rows"},
        fails=True,  # it is valid for one row or several
    ),
    "a program that is saved": Script(
        X
        + "torch.export.save(torch.export.export(Net(), args=(x,), kwargs={'scale': x[:, :1]}), 'net.pt2')\n",
        {"x": (2, 4), "scale": (2, 1)},
    ),
    "an exporter of a former version": Script(
        X
        + """
options = torch.onnx.ExportOptions(dynamic_shapes=True)
torch.onnx.dynamo_export(Net(), x, scale=torch.ones(2, 1), export_options=options).save("net.onnx")
""",
        {"x": (2, 4), "scale": (2, 1)},
        fails=True,
    ),
    "options of a former version": Script(
        X
        + """
torch.onnx.export(Net(), x, "net.onnx", True, False, example_outputs=x, enable_onnx_checker=True,
                  use_external_data_format=False, input_names=["input.1"])
""",
        {"input.1": (2, 4)},
        fails=True,
    ),
    "a decision on values": Script(
        X
        + """
class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.experts, self.router = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)

    def forward(self, x):
        scores, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = torch.where(chosen == index)[0]
            if rows.numel() > 0:
                y[rows] = expert(x[rows]) * scores[rows, None]
        return y

torch.onnx.export(Chooses(), (x,), "net.onnx", dynamo=True, dynamic_shapes={"x": {0: "tokens"}})
""",
        free={("x", 0): "tokens"},
        fails=True,
    ),
    "a folder that is not there": Script(
        X + "torch.onnx.export(Net(), x, 'no/such/folder/net.onnx', dynamo=False)\n", fails=True
    ),
    "several models in a class that exports": Script(
        X
        + """
class Exporter:
    def __init__(self, **models):
        self.models = models

    def run(self):
        for name, model in self.models.items():
            torch.onnx.export(model, torch.randn(2, model.linear.in_features), f"{name}.onnx", input_names=[name])

Exporter(encoder=Net(4), decoder=Net(5)).run()
""",
        {"encoder": (2, 4)},
    ),
    "imported by its own name, tried and logged": Script(
        X
        + """
from torch import onnx as torch_onnx
try:
    torch_onnx.export(Net(), x, "net.onnx", verbose=False)
except Exception as error:
    print("export failed", error)
    raise SystemExit(1)
"""
    ),
    "a function of tensors": Script(
        "def route(x, w, k: int = 2):\n    scores, ids = (x @ w).softmax(-1).topk(k)\n    return scores, ids\n"
        "torch.onnx.export(torch.jit.trace(route, (torch.randn(2, 4), torch.randn(4, 3))), "
        "(torch.randn(2, 4), torch.randn(4, 3)), 'route.onnx', input_names=['x', 'w'])\n",
        {"x": (2, 4), "w": (4, 3)},
        ("scores", "ids"),
        header="import torch\n",
    ),
    "torch_tensorrt with ranges": Script(
        """
        import torch_tensorrt

        model = Net().eval().cuda()
        shapes = dict(min_shape=[1, 4], opt_shape=[8, 4], max_shape=[64, 4])
        trt = torch_tensorrt.compile(
            model, inputs=[torch_tensorrt.Input(**shapes, dtype=torch.float32, shared_dims={0: "batch"})],
            enabled_precisions={torch.float, torch.half}, truncate_double=True,
        )
        torch_tensorrt.save(trt, "net.ep")
        """,
        {"x": (8, 4)},
        free={("x", 0): "batch"},
        fails=True,
    ),
    "torch_tensorrt of a program and of a method": Script(
        X
        + """
import torch_tensorrt as trt
engine = trt.dynamo.compile(torch.export.export(Net(), (x.cuda(),)), inputs=[x.cuda()], min_block_size=1)
""",
        fails=True,
    ),
    "torch.compile for TensorRT": Script(
        X
        + """
other = nn.Linear(4, 4)
fast = torch.compile(Net().eval(), backend="torch_tensorrt", dynamic=False, options={"truncate_long_and_double": True})
for _ in range(3):
    fast(other(x))
""",
        fails=True,
    ),
}


@pytest.fixture
def tensorrt(write):
    """torch_tensorrt as far as a script sees it."""
    write(TENSORRT, "torch_tensorrt/__init__.py", header="")
    write(TENSORRT_INPUT, "torch_tensorrt/_input.py", header="")
    write(TENSORRT_DYNAMO, "torch_tensorrt/dynamo.py", header="")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_tensorrt"]:
        del sys.modules[name]


def subject_of(write, script: Script) -> Any:
    for name, text in script.files.items():
        write(text, name, header="")
        sys.modules.pop(name.removesuffix(".py"), None)
    return load_subject(str(write(script.text, header=script.header)))


def test_there_are_twenty_of_which_five_fail():
    assert len(SCRIPTS) >= 20
    assert sum(script.fails for script in SCRIPTS.values()) >= 5


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_script_asks_for_is_read(write, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    script = SCRIPTS[name]
    before = (torch.onnx.export, torch.jit.trace, torch.export.export, torch.compile)
    subject = subject_of(write, script)
    assert {key: tuple(value.shape) for key, value in subject.inputs.items()} == script.inputs
    assert subject.outputs == script.outputs
    assert subject.free == script.free
    assert "the script's own call of torch" in subject.how
    assert (torch.onnx.export, torch.jit.trace, torch.export.export, torch.compile) == before
    assert "_Patching" not in {type(finder).__name__ for finder in sys.meta_path}
    assert not list(tmp_path.glob("**/*.onnx*"))  # its own call has written nothing


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS])
def test_the_graph_is_of_its_model(write, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    subject = subject_of(write, SCRIPTS[name])
    options = Options(dims=requested(subject, (), False), gates=False, simplify=False)
    graph = export_subject(subject, options)[0]
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())
    assert [each.name for each in session.get_inputs()] == list(SCRIPTS[name].inputs)
    found = session.run(None, {key: value.numpy() for key, value in subject.inputs.items()})
    for right, got in zip(subject.call_named(subject.inputs), found, strict=True):
        tolerance = 2e-2 if right.dtype is torch.float16 else 1e-5
        np.testing.assert_allclose(got, right.detach().numpy(), rtol=tolerance, atol=tolerance)
