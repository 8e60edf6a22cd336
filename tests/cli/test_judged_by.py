"""A graph never chooses what it is held against, nor how: its metadata are its author's word."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from slow_cases import slow

HALF = (
    "the graph computes in bfloat16, and is judged by float32: --dtype bfloat16 judges it by what that loses"
)


def says(path, **facts):
    """Let a graph say something of itself."""
    model = onnx.load(path)
    kept = [prop for prop in model.metadata_props if prop.key.removeprefix("moe_export.") not in facts]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for name, value in facts.items():
        model.metadata_props.add(key=f"moe_export.{name}", value=value)
    onnx.save(model, path)


def damage(path, by=1.01):
    """Make every weight of a graph a little larger."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim > 1:
            tensor.CopyFrom(numpy_helper.from_array(array * np.float32(by), tensor.name))
    onnx.save(model, path)


@pytest.fixture
def graph(finished, tmp_path):
    """A copy of a finished graph, beside its model."""

    def copy(name):
        shutil.copy(finished / f"{name.partition('.')[0]}.py", tmp_path)
        shutil.copy(finished / f"{name}.onnx", tmp_path)
        return tmp_path / f"{name}.onnx"

    return copy


@pytest.mark.parametrize("dtype", [slow("float16"), "bfloat16", slow("float64")])
@pytest.mark.slow
def test_a_graph_that_says_it_is_less_exact(command, graph, dtype):
    path = graph("block")
    damage(path, 1 + 1e-3)
    says(path, dtype=dtype)
    done = command("verify", path.name, "--against", "block.py", "--no-localise")
    assert done.code == 1
    assert "rtol=1e-05 atol=1e-05" in done.out


@pytest.mark.slow
def test_half_precision_is_judged_as_such_where_the_user_says_so(command, write, texts):
    model = write(texts["model"], "net.py")
    assert command(model, "--dtype", "bfloat16", "--quiet").code == 0
    strict = command("verify", "net.onnx", "--against", model, "--no-localise")
    assert strict.code == 1
    assert HALF in " ".join(strict.out.split())
    asked = command("verify", "net.onnx", "--against", model, "--dtype", "bfloat16")
    assert asked.code == 0, asked.out
    assert HALF not in " ".join(asked.out.split())


@pytest.mark.slow
def test_a_graph_of_the_whole_model_that_says_it_is_a_gate(command, graph):
    path = graph("moe")
    says(path, kind="gate", module="gate")
    done = command("verify", path.name, "--against", "moe.py")
    assert done.out.startswith("onnxruntime-cpu matches torch"), done.out
    damage(path)
    assert command("verify", path.name, "--against", "moe.py", "--no-localise").code == 1


@pytest.mark.slow
def test_the_verdict_of_a_gate_says_what_it_was_compared_with(command, graph):
    path = graph("moe.gate")
    for options in ((), ("--gate", "gate")):
        done = command("verify", path.name, "--against", "moe.py", *options)
        assert done.code == 0, done.out
        assert done.out.startswith("onnxruntime-cpu matches the gate of gate alone, not the model (torch)")
    said = json.loads(command("verify", path.name, "--against", "moe.py", "--json").out)
    assert said["about"]["compared with"] == "the gate of gate alone, not the model"


@pytest.mark.slow
def test_a_gate_that_says_nothing_of_itself(command, graph):
    path = graph("moe.gate")
    says(path, kind="model")
    assert command("verify", path.name, "--against", "moe.py", "--no-localise").code in (1, 2)
    assert command("verify", path.name, "--against", "moe.py", "--gate", "gate").code == 0


def test_a_gate_that_there_is_not(command, graph):
    done = command("verify", graph("moe.gate").name, "--against", "moe.py", "--gate", "router")
    assert done.code == 2
    assert "the model has no gate in module 'router'" in done.err
    assert "the gates of the model: gate" in done.err


@pytest.mark.slow
def test_a_reference_graph_in_half_precision_says_what_may_be_asked(command, write, texts):
    model = write(texts["model"], "net.py")
    for dtype in ("float32", "bfloat16"):
        assert command(model, "--dtype", dtype, "-o", dtype, "--quiet", "--no-verify").code == 0
    narrow, wide = "bfloat16/net.onnx", "float32/net.onnx"
    assert command("verify", wide, "--against", narrow).code == 0
    assert command("verify", narrow, "--against", wide, "--no-localise").code == 1
    assert command("verify", narrow, "--against", wide, "--dtype", "bfloat16").code == 0
