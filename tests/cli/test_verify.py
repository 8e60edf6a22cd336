"""`moe-export verify`: graphs of this tool, of others, wrong ones, and files that are no graphs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from slow_cases import slow
from torch import nn


def mutated(source, target, name=None, factor=1.05):
    """A copy of a graph in which one float weight is a little off."""
    model = onnx.load(source)
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    tensor = max(weights, key=lambda tensor: len(tensor.raw_data))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[(0,) * array.ndim] = array[(0,) * array.ndim] * factor + 0.1
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize(
    ("graph", "model"), [("block.onnx", "block.py"), ("moe.onnx", "moe.py"), ("moe.gate.onnx", "moe.py")]
)
def test_a_right_graph(command, finished, graph, model):
    done = command("verify", finished / graph, "--against", finished / model)
    assert done.code == 0
    against = "the gate of gate alone, not the model (torch)" if "gate" in graph else "torch"
    assert f"onnxruntime-cpu matches {against}" in done.out


@pytest.mark.parametrize(
    ("graph", "model"),
    [("block.onnx", "block.py"), slow(("moe.onnx", "moe.py")), ("moe.gate.onnx", "moe.py")],
)
def test_a_wrong_weight(command, finished, tmp_path, graph, model):
    wrong = mutated(finished / graph, tmp_path / graph)
    done = command("verify", wrong, "--against", finished / model, "--no-localise")
    assert done.code == 1
    against = "the gate of gate alone, not the model (torch)" if "gate" in graph else "torch"
    assert f"onnxruntime-cpu against {against}: not equal" in done.out


def test_json(command, finished, tmp_path):
    done = command("verify", finished / "block.onnx", "--against", finished / "block.py", "--json")
    assert json.loads(done.out)["verdict"] == "equal"
    wrong = mutated(finished / "block.onnx", tmp_path / "wrong.onnx")
    done = command("verify", wrong, "--against", finished / "block.py", "--json", "--no-localise")
    assert (done.code, json.loads(done.out)["verdict"]) == (1, "not equal")


def test_quiet(command, finished, tmp_path):
    done = command("verify", finished / "block.onnx", "--against", finished / "block.py", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    wrong = mutated(finished / "block.onnx", tmp_path / "wrong.onnx")
    done = command("verify", wrong, "--against", finished / "block.py", "--quiet")
    assert (done.code, done.out) == (1, "")


def test_a_loose_tolerance(command, finished, tmp_path):
    wrong = mutated(finished / "block.onnx", tmp_path / "wrong.onnx")
    assert command("verify", wrong, "--against", finished / "block.py", "--atol", "10").code == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [slow(False), True])
def test_a_graph_that_pytorch_exported(command, write, tmp_path, dynamic):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    torch.onnx.export(
        model,
        (torch.randn(2, 4),),
        tmp_path / "foreign.onnx",
        dynamo=True,
        dynamic_shapes=shapes,
        verbose=False,
    )
    path = write("model = nn.Linear(4, 4)\nexample_inputs = (torch.randn(2, 4),)\n")
    done = command("verify", "foreign.onnx", "--against", path)
    assert done.code == 0, done.out + done.err
    torch.manual_seed(1)
    other = write("torch.manual_seed(1)\nmodel = nn.Linear(4, 4)\nexample_inputs = (torch.randn(2, 4),)\n")
    assert command("verify", "foreign.onnx", "--against", other, "--no-localise").code == 1


def test_outputs_by_other_names(command, finished, tmp_path):
    model = onnx.load(finished / "block.onnx")
    old = model.graph.output[0].name
    model.graph.output[0].name = "logits"
    for node in model.graph.node:
        node.output[:] = ["logits" if name == old else name for name in node.output]
    onnx.save(model, tmp_path / "renamed.onnx")
    done = command("verify", "renamed.onnx", "--against", finished / "block.py")
    assert done.code == 0, done.out + done.err


def renamed_inputs(source, target, names):
    model = onnx.load(source)
    for value in model.graph.input:
        value.name = names[value.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, target)


def test_inputs_by_other_names(command, finished, tmp_path):
    """As many as the model has: they are matched in order, and the numbers show whether that is right."""
    renamed_inputs(finished / "block.onnx", tmp_path / "renamed.onnx", {"x": "input.1"})
    done = command("verify", "renamed.onnx", "--against", finished / "block.py")
    assert done.code == 0, done.out + done.err


def test_inputs_that_cannot_be_matched(command, finished, tmp_path, write, texts):
    text = (
        texts["model"].replace("def forward(self, x)", "def forward(self, x, y)").replace("4),)", "4),) * 2")
    )
    renamed_inputs(finished / "block.onnx", tmp_path / "renamed.onnx", {"x": "features"})
    done = command("verify", "renamed.onnx", "--against", write(text))
    assert done.code == 2
    assert "error: the graph takes features, but the model takes x, y\n" in done.err
    assert "name the graph's inputs as forward's parameters are named" in done.err


def test_a_graph_of_other_sizes(command, finished, write, texts):
    path = write(texts["block"] + "model = Block(6)\nexample_inputs = (torch.randn(2, 3, 6),)\n")
    done = command("verify", finished / "block.onnx", "--against", path)
    assert done.code == 2
    assert "error: the graph takes x" in done.err
    assert "but the model's example has shape [2, 3, 6]" in done.err


def test_a_gate_graph_against_a_model_without_that_gate(command, finished):
    done = command("verify", finished / "moe.gate.onnx", "--against", finished / "block.py")
    assert done.code == 2
    assert "the model has no gate in module 'gate'" in done.err
    assert "the gates of the model: none" in done.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not an ONNX model, or a truncated one"),
        (b"# markdown\n", "not an ONNX model, or a truncated one"),
    ],
)
def test_what_is_no_graph(command, finished, tmp_path, content, said):
    (tmp_path / "x.onnx").write_bytes(content)
    done = command("verify", "x.onnx", "--against", finished / "block.py")
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_graph(command, finished, tmp_path, keep):
    data = (finished / "moe.onnx").read_bytes()
    (tmp_path / "x.onnx").write_bytes(data[: int(len(data) * keep)])
    done = command("verify", "x.onnx", "--against", finished / "moe.py")
    assert done.code == 2
    assert done.err.startswith("error: not an ONNX model, or a truncated one\n")


def test_no_such_graph(command, finished):
    done = command("verify", "none.onnx", "--against", finished / "block.py")
    assert (done.code, done.err.splitlines()[0]) == (2, "error: no such file: none.onnx")


def test_a_model_file_that_is_none(command, finished):
    done = command("verify", finished / "block.onnx", "--against", "none.py")
    assert done.code == 2
    assert "no such file" in done.err


def test_against_is_required(command, finished):
    done = command("verify", finished / "block.onnx")
    assert done.code == 2
    assert "Missing option '--against'" in done.err


def test_cuda_on_a_machine_without(command, finished):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = command(
        "verify", finished / "block.onnx", "--against", finished / "block.py", "--backend", "onnxruntime-cuda"
    )
    assert done.code == 4
    assert done.err.startswith("error: ")


def test_a_graph_with_its_weights_beside_it(command, finished, tmp_path):
    model = onnx.load(finished / "block.onnx")
    onnx.save(
        model, tmp_path / "block.onnx", save_as_external_data=True, size_threshold=0, location="block.data"
    )
    done = command("verify", "block.onnx", "--against", finished / "block.py")
    assert done.code == 0
    (tmp_path / "block.data").unlink()
    done = command("verify", "block.onnx", "--against", finished / "block.py")
    assert done.code == 2


def test_the_files_that_are_verified_do_not_change(command, finished):
    before = (finished / "block.onnx").read_bytes()
    shutil.copy(finished / "block.onnx", "copy.onnx")
    command("verify", "copy.onnx", "--against", finished / "block.py")
    assert np.array_equal(before, (finished / "block.onnx").read_bytes())


def test_a_time_limit_is_an_exit_code_of_its_own(command, finished, tmp_path):
    done = command("verify", finished / "block.onnx", "--against", finished / "block.py", "--time-limit", "0",
                   "-o", tmp_path / "r.json")  # fmt: skip
    assert done.code == 5
    assert "onnxruntime-cpu against torch: unfinished (1 of " in done.out
    assert command("judge", tmp_path / "r.json", "--rtol", "1").code == 5
    done = command(finished / "block.py", "-o", tmp_path / "out", "--time-limit", "0")
    assert done.code == 5
    assert "NOT FINISHED" in done.out
    assert (tmp_path / "out" / "block.rejected.onnx").exists()
    assert not (tmp_path / "out" / "block.onnx").exists()
