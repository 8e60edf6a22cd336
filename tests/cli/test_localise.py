"""`verify` names the node, its module and its line; writes the fault as a folder; `mutate` tests the gate."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from moe_export.export.frontend.load import load_subject
from moe_export.export.tracing.trace import quiet


@pytest.fixture
def broken(finished, tmp_path):
    """A copy of a finished graph with one thing changed."""

    def broken(name, change):
        shutil.copy(finished / f"{name}.py", tmp_path)
        model = onnx.load(finished / f"{name}.onnx")
        change(model.graph)
        onnx.save(model, tmp_path / "wrong.onnx")
        return tmp_path / "wrong.onnx", tmp_path / f"{name}.py"

    return broken


def another_activation(graph):
    node = next(node for node in graph.node if node.op_type == "Relu")
    node.op_type = "Tanh"


def nudged(graph):
    tensor = next(tensor for tensor in graph.initializer if tensor.name.endswith("linear.bias"))
    array = numpy_helper.to_array(tensor).copy()
    array[2] += 1e-3
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def line_with(path, text):
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


@pytest.mark.slow
def test_the_node_and_its_line(command, broken):
    graph, model = broken("block", another_activation)
    done = command("verify", graph, "--against", model)
    assert done.code == 1
    line = line_with(model, "self.linear(x).relu()")
    said = done.out[done.out.index("first faulty node: ") :]
    assert said.startswith("first faulty node: Tanh ")
    assert f"block.py:{line}" in said.splitlines()[0]
    assert "(found in the case 'example')" in said


@pytest.mark.slow
def test_the_weight_and_its_place(command, broken):
    graph, model = broken("block", nudged)
    done = command("verify", graph, "--against", model)
    assert done.code == 1
    assert "(module linear)" in done.out
    assert "linear.bias differs from the reference's in 1 of 4 elements, most at [2]" in done.out


@pytest.mark.slow
def test_it_can_be_left_away(command, broken):
    graph, model = broken("block", another_activation)
    done = command("verify", graph, "--against", model, "--no-localise")
    assert done.code == 1
    assert "faulty" not in done.out


def test_a_right_graph_has_no_faulty_node(command, finished):
    done = command("verify", finished / "moe.onnx", "--against", finished / "moe.py")
    assert (done.code, "faulty" in done.out) == (0, False)


@pytest.mark.slow
def test_the_json(command, broken):
    graph, model = broken("block", another_activation)
    document = json.loads(command("verify", graph, "--against", model, "--json").out)
    why = document["why"]
    assert (why["case"], why["level"]) == ("example", "none")
    assert why["faulty_node"]["op"] == "Tanh"
    assert why["faulty_node"]["ratio"] > 1


@pytest.mark.slow
def test_the_reproduction(command, broken, tmp_path):
    graph, model = broken("block", another_activation)
    done = command("verify", graph, "--against", model, "--repro", tmp_path / "fault")
    written = sorted(path.name for path in (tmp_path / "fault").iterdir())
    assert written == [
        "expected.npz",
        "inputs.npz",
        "model.errors.json",
        "model.errors.onnx",
        "model.onnx",
        "run.py",
    ]
    assert f"written: {tmp_path / 'fault' / 'run.py'}" in done.out
    script = [sys.executable, str(tmp_path / "fault" / "run.py")]
    shown = subprocess.run(script, capture_output=True, text=True, check=False)
    assert shown.returncode == 1, shown.stderr
    assert "elements are wrong" in shown.stdout


@pytest.mark.slow
def test_a_gate_and_experts(command, broken):
    def smallest(graph):
        node = next(node for node in graph.node if node.op_type == "TopK")
        node.attribute.append(onnx.helper.make_attribute("largest", 0))
        for attribute in list(node.attribute)[:-1]:
            if attribute.name == "largest":
                node.attribute.remove(attribute)

    graph, model = broken("moe", smallest)
    done = command("verify", graph, "--against", model)
    assert done.code == 1
    assert "first faulty node: TopK " in done.out
    assert "(module gate)" in done.out


def test_a_graph_of_pytorchs_own_exporter(command, finished, tmp_path):
    """Its metadata say the same at length."""
    subject = load_subject(str(finished / "block.py"), init=(), inputs=())
    example = tuple(subject.inputs.values())
    with quiet():
        program = torch.onnx.export(subject.module, example, dynamo=True, verbose=False)
    model = program.model_proto
    another_activation(model.graph)
    onnx.save(model, tmp_path / "theirs.onnx")
    done = command("verify", tmp_path / "theirs.onnx", "--against", finished / "block.py")
    assert done.code == 1
    assert "first faulty node: Tanh " in done.out
    assert f"block.py:{line_with(finished / 'block.py', 'self.linear(x).relu()')}" in done.out


@pytest.mark.slow
def test_a_graph_that_says_nothing_of_its_nodes(command, broken, tmp_path):
    def mute(graph):
        another_activation(graph)
        for index, node in enumerate(graph.node):
            del node.metadata_props[:]
            node.name = f"n{index}"
            node.input[:] = [f"v_{name}" if name in inner else name for name in node.input]
            node.output[:] = [f"v_{name}" if name in inner else name for name in node.output]
        del graph.value_info[:]

    source = onnx.load(broken("block", lambda graph: None)[0])
    outputs = {output.name for output in source.graph.output}
    inner = {name for node in source.graph.node for name in node.output} - outputs
    graph, model = broken("block", mute)
    done = command("verify", graph, "--against", model)
    assert done.code == 1
    assert "faulty" in done.out or "none can be named" in done.out


@pytest.mark.slow
def test_what_no_output_shows_is_seen_inside(command, write, tmp_path):
    model = write(
        """
        class Whisper(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x):
                return x + 1e-6 * self.linear(x)

        model = Whisper()
        example_inputs = (torch.randn(2, 3, 4),)
        """,
        "whisper.py",
    )
    assert command(model, "-o", tmp_path, "--quiet").code == 0
    right = command("verify", "whisper.onnx", "--against", model, "--inside")
    assert (right.code, "faulty" in right.out) == (0, False)
    graph = onnx.load(tmp_path / "whisper.onnx")
    nudged(graph.graph)
    onnx.save(graph, tmp_path / "wrong.onnx")
    assert command("verify", "wrong.onnx", "--against", model).code == 0
    wrong = command("verify", "wrong.onnx", "--against", model, "--inside")
    assert wrong.code == 1
    assert "(module linear)" in wrong.out


@pytest.mark.slow
def test_every_mutant_of_a_block_is_caught(command, finished):
    done = command("mutate", finished / "block.onnx", "--against", finished / "block.py", "--json")
    report = json.loads(done.out)
    assert done.code == 0
    assert report["schema"] == "moe-export/mutation-report/1"
    assert (report["survived"], report["score"]) == (0, 1.0)
    assert report["caught"] >= 8
    assert {"weight", "transposed", "NaN", "bias", "activation", "constant"} <= {
        mutant["kind"] for mutant in report["mutants"]
    }


def test_some_mutants_of_some_kinds_as_a_table(command, finished):
    options = ["--against", finished / "moe.py", "--kind", "top-k", "--kind", "swapped", "--limit", "1"]
    done = command("mutate", finished / "moe.onnx", *options)
    assert done.code == 0
    assert [line.split()[:3] for line in done.out.splitlines() if line[:6] in ("top-k ", "swappe")] == [
        ["swapped", "1", "1"],
        ["top-k", "1", "1"],
    ]
    assert "mutation score: 2 of 2" in done.out


def test_what_mutate_does_not_take(command, finished, broken):
    done = command("mutate", finished / "moe.onnx", "--against", finished / "moe.py", "--kind", "typo")
    assert (done.code, "no kind of mutant is called 'typo'" in done.err) == (2, True)
    graph, model = broken("block", nudged)
    done = command("mutate", graph, "--against", model)
    assert done.code == 2
    assert "is not equal to" in done.err
    assert "moe-export verify" in done.err


def test_the_numbers_of_a_score():
    from moe_export.commands.mutate import Score
    from moe_export.comparing.mutant_result import MutantResult

    fates = [
        MutantResult("weight", "n", "w", outcome, off=1e-6)
        for outcome in ("caught", "survived", "equivalent")
    ]
    score = Score(
        (
            *fates,
            MutantResult("axis", "m", "a", "below rounding"),
            MutantResult("axis", "m", "b", "stillborn"),
        ),
        7,
    )
    lines = list(score.lines())
    assert score.exit_code == 1
    assert "mutation score: 1 of 2 (7 cases)" in "\n".join(lines)
    assert lines[-1] == "  SURVIVED: weight: n: w  (off by 1.0e-06 in float64)"
    assert np.isclose(score.to_dict("g", "m")["score"], 0.5)


@pytest.mark.slow
def test_a_graph_in_low_precision(command, finished, tmp_path):
    """Rounding is no fault: its nodes are held against those of a new export in the same type."""
    shutil.copy(finished / "block.py", tmp_path)
    assert command(tmp_path / "block.py", "--dtype", "bfloat16", "-o", tmp_path, "--quiet").code == 0
    graph = onnx.load(tmp_path / "block.onnx")
    another_activation(graph.graph)
    onnx.save(graph, tmp_path / "wrong.onnx")
    done = command("verify", "wrong.onnx", "--against", "block.py")
    assert done.code == 1
    assert "first faulty node: Tanh " in done.out
    assert "it is Tanh, in the reference Relu" in done.out
