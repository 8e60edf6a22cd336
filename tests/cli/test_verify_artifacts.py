"""`moe-export verify` with every kind of side, golden files, own inputs, and the reports it writes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from slow_cases import one_in, only, slow

OWN = """
class Net(nn.Module):
    def forward(self, x):
        return x * 2

model = Net()
example_inputs = {"x": torch.ones(2, 3) * 0.5}

def inputs(seed):
    return {"x": torch.full((2, 3), 100.0 + seed)}
"""


def code_of(command, *args):
    done = command("verify", *args)
    return done.code, done.out + done.err


@pytest.mark.parametrize(
    ("candidate", "against"),
    [
        slow(("moe.onnx", "moe.py@torch-float64")),
        slow(("moe.onnx", "moe.onnx@onnx-reference")),
        ("moe.onnx@onnx-reference", "moe.py"),
        slow(("moe.onnx@onnx-reference", "moe.onnx")),
        slow(("moe.py", "moe.onnx")),
        ("moe.py", "moe.py@torch-float64"),
    ],
)
def test_every_pair_of_artifacts_of_one_model_is_equal(command, finished, candidate, against):
    code, text = code_of(command, finished / candidate, "--against", finished / against)
    assert code == 0, text


@pytest.mark.slow
@pytest.mark.parametrize("candidate", one_in(2, ["moe.onnx", "moe.onnx@onnx-reference"]))
@pytest.mark.parametrize(
    "against", only(["moe.py@torch-float64"], ["moe.py", "moe.py@torch-float64", "moe.onnx"])
)
def test_a_wrong_graph_is_wrong_against_each(command, finished, tmp_path, candidate, against):
    wrong = onnx.load(finished / "moe.onnx")
    for tensor in wrong.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.01, tensor.name)
            )
    onnx.save(wrong, tmp_path / "moe.onnx")
    code, text = code_of(command, tmp_path / candidate, "--against", finished / against, "--no-localise")
    assert code == 1, text


def test_several_artifacts_at_once(command, finished):
    args = ["--against", finished / "block.py", "--against", finished / "moe.py"]
    assert command("verify", finished / "moe.onnx", *args).code == 2  # other inputs
    args = ["--against", finished / "moe.py", "--against", finished / "moe.onnx@onnx-reference", "--json"]
    done = command("verify", finished / "moe.onnx", *args)
    document = json.loads(done.out)
    assert document["schema"] == "moe-export/verify-reports/1"
    assert [found["reference"] for found in document["reports"]] == ["torch", "onnx-reference"]


@pytest.mark.slow
def test_several_backends_in_one_table(command, finished):
    args = ("verify", finished / "moe.onnx", "--against", finished / "moe.py", "--backend")
    done = command(*args, "onnxruntime-cpu,openvino")
    assert done.code == 0, done.err
    head, _, *rows = done.out.splitlines()
    assert head == "against torch"
    cells = [line.split() for line in rows if line]
    assert cells[0] == ["output", "dtype", "onnxruntime-cpu", "openvino"]
    assert cells[-1] == ["verdict", "equal", "equal"]
    assert {line[0] for line in cells[1:-1]} == {"add_3", "topk_idx", "topk_weight"} or len(cells) > 2
    done = command(*args, "openvino,onnxruntime-cuda", "--json")
    document = json.loads(done.out)
    assert [found["candidate"] for found in document["reports"]] == ["openvino"]
    if done.code:
        assert done.code == 4  # what could be run is equal, and one could not
        assert document["not_run"][0]["candidate"] == "onnxruntime-cuda"


@pytest.mark.slow
def test_of_several_backends_only_what_differs_is_told_in_full(command, finished, tmp_path, write):
    """Integers beyond int32 are beyond OpenVINO, too."""
    model = write("class Wide(nn.Module):\n    def forward(self, n):\n        return n + n\n"
                  "model = Wide()\nexample_inputs = (torch.arange(6).reshape(2, 3),)\n", "wide.py")  # fmt: skip
    assert command(model, "-o", tmp_path, "--quiet").code == 0
    args = ("verify", tmp_path / "wide.onnx", "--against", model, "--backend", "onnxruntime-cpu,openvino")
    done = command(*args)
    assert done.code == 1
    assert done.out.count("size combinations") == 1
    assert "FAILED in openvino only, large integers" in done.out
    assert "computes int64 as int32" in done.out


@pytest.mark.slow
def test_the_node_that_one_engine_computes_otherwise_has_a_line(command, tmp_path, write):
    """The product is beyond int32, in which OpenVINO computes it; inputs and outputs are not."""
    text = """
    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 4)

        def forward(self, ids):
            far = ids * 2**33
            return self.table(ids) * (far // 2**32).unsqueeze(-1).float()

    model = Far()
    example_inputs = (torch.arange(6).reshape(2, 3),)
    """
    model = write(text, "far.py")
    assert command(model, "-o", tmp_path, "--quiet").code == 0
    done = command(
        "verify", tmp_path / "far.onnx", "--against", model, "--backend", "onnxruntime-cpu,openvino"
    )
    assert done.code == 1
    assert "onnxruntime computes the graph right, openvino does not" in done.out
    line = next(n for n, each in enumerate(model.read_text().splitlines(), 1) if "far = " in each)
    assert re.search(rf"first faulty node: Mul \S+  far\.py:{line}", done.out), done.out


def test_a_backend_that_there_is_not_among_several(command, finished):
    done = command(
        "verify", finished / "moe.onnx", "--against", finished / "moe.py", "--backend", "tpu,torch"
    )
    assert done.code == 2
    assert "there is no backend 'tpu'" in done.err
    assert "onnxruntime-cpu" in done.err


@pytest.mark.parametrize(
    ("side", "said"),
    [
        ("moe.onnx@torch", "torch cannot run"),
        ("moe.py@onnxruntime-cpu", "a model file has torch, torch-float64"),
        ("moe.onnx@tensorrt", "a graph has onnxruntime"),
        ("g.safetensors@torch", "a golden file has no backend"),
    ],
)
def test_a_backend_that_cannot_run_a_side(command, finished, side, said):
    code, text = code_of(command, finished / side, "--against", finished / "moe.py")
    assert code == 2
    assert said in text


@pytest.mark.parametrize("name", only(["block"], ["moe", "block"]))
def test_golden_tensors(command, finished, tmp_path, name):
    golden = tmp_path / "golden.safetensors"
    done = command("verify", finished / f"{name}.py", "--record", golden)
    assert done.code == 0, done.err
    assert "recorded: " in done.out
    for side in (f"{name}.onnx", f"{name}.py", f"{name}.onnx@onnx-reference"):
        code, text = code_of(command, finished / side, "--against", golden)
        assert code == 0, text
    assert command("verify", golden, "--against", finished / f"{name}.py").code == 0
    assert command("verify", golden, "--against", golden).code == 0
    other = "block" if name == "moe" else "moe"
    assert command("verify", finished / f"{other}.onnx", "--against", golden).code in {1, 2}


@pytest.mark.slow
def test_a_comparison_is_recorded_while_it_runs(command, finished, tmp_path):
    graph, golden = finished / "moe.gate.onnx", tmp_path / "golden.safetensors"
    done = command("verify", graph, "--against", finished / "moe.py", "--record", golden)
    assert done.code == 0, done.out + done.err
    code, text = code_of(command, graph, "--against", golden)
    assert code == 0, text
    assert "alone, not the model (golden torch) (rtol=" in text


@pytest.mark.parametrize("side", one_in(2, ["moe.py@torch-float64", "moe.onnx", "moe.onnx@onnx-reference"]))
def test_every_kind_of_comparison_can_be_recorded(command, finished, tmp_path, side):
    graph, golden = finished / "moe.onnx", tmp_path / "golden.safetensors"
    done = command("verify", graph, "--against", finished / side, "--record", golden)
    assert done.code == 0, done.out + done.err
    assert f"recorded: {golden}" in done.out.replace("\n", "")
    code, text = code_of(command, graph, "--against", golden)
    assert code == 0, text


def test_golden_tensors_need_no_pytorch(command, finished, tmp_path):
    golden = tmp_path / "golden.safetensors"
    assert command("verify", finished / "moe.py", "--record", golden, "--quiet").code == 0
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from moe_export.cli import run\n"
        f"code = run(['verify', {str(finished / 'moe.onnx')!r}, '--against', {str(golden)!r}])\n"
        "assert not any(name.startswith('torch.') for name in sys.modules)\n"
        "raise SystemExit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "onnxruntime-cpu matches golden torch" in done.stdout
    assert "also with bfloat16 values, zeros" in done.stdout


def test_what_cannot_be_recorded_or_read(command, finished, tmp_path):
    done = command("verify", finished / "moe.onnx", "--record", tmp_path / "g.safetensors")
    assert (done.code, "only a model file can be recorded alone" in done.err) == (2, True)
    (tmp_path / "bad.safetensors").write_text("hello")
    done = command("verify", finished / "moe.onnx", "--against", tmp_path / "bad.safetensors")
    assert (done.code, "no safetensors file" in done.err) == (2, True)


@pytest.mark.slow
def test_own_inputs_from_a_file_and_from_a_function(command, finished, write, tmp_path):
    model = write(OWN, "own.py")
    assert command(model, "-o", tmp_path, "--quiet").code == 0
    done = command("verify", "own.onnx", "--against", model, "--seeds", 2, "--seed", 5, "-v")
    assert done.code == 0, done.err
    assert "inputs(5); inputs(6)" in done.out
    np.savez(tmp_path / "mine.npz", x=np.ones((4, 3), np.float32))
    done = command("verify", "own.onnx", "--against", model, "--input-file", "mine.npz", "--json")
    labels = {case["label"]: case["sizes"] for case in json.loads(done.out)["cases"]}
    assert 4 in labels["mine.npz"].values()
    np.savez(tmp_path / "wrong.npz", x=np.ones((4, 3)))
    done = command("verify", "own.onnx", "--against", model, "--input-file", "wrong.npz")
    assert (done.code, "the input 'x' is float64[4, 3], the model takes" in done.err) == (2, True)


def test_one_case_alone(command, finished):
    args = [finished / "block.onnx", "--against", finished / "block.py"]
    done = command("verify", *args, "--case", "zeros", "--json")
    assert [case["label"] for case in json.loads(done.out)["cases"]] == ["zeros"]
    done = command("verify", *args, "--case", "nothing")
    assert (done.code, "there is no case 'nothing'" in done.err) == (2, True)


@pytest.mark.slow
def test_a_failing_report_says_how_to_reproduce_its_case(command, finished, write, texts):
    other = write("torch.manual_seed(1)\n" + texts["model"])
    done = command("verify", finished / "block.onnx", "--against", other, "--seed", 3)
    assert done.code == 1
    (reproduce,) = [line for line in done.out.splitlines() if line.startswith("reproduce: ")]
    assert reproduce.endswith("--seed 3 --case example")
    words = shlex.split(reproduce.removeprefix("reproduce: "))
    assert words[:2] == ["moe-export", "verify"]
    assert command(*words[1:]).code == 1


@pytest.mark.slow
def test_thorough_seeds_and_sizes(command, finished):
    args = [finished / "moe.onnx", "--against", finished / "moe.py", "--json"]
    many = json.loads(command("verify", *args, "--thorough", "--seeds", 3).out)["cases"]
    assert {case["seed"] for case in many} >= {0, 1, 2}
    assert {f"expert {n} alone" for n in range(4)} <= {case["label"] for case in many}
    args = [finished / "block.onnx", "--against", finished / "block.py", "--json"]
    few = json.loads(command("verify", *args).out)["cases"]
    assert len(many) > len(few) + 20
    name = next(iter(few[0]["sizes"]))
    assert command("verify", *args, "--size", "nothing=3").code == 2
    assert command("verify", *args, "--size", f"{name}=77").code == 0


@pytest.mark.slow
def test_tolerances_of_one_output(command, finished, write, texts):
    other = write("torch.manual_seed(1)\n" + texts["model"])
    args = [finished / "block.onnx", "--against", other, "--no-localise"]
    name = onnx.load(finished / "block.onnx").graph.output[0].name
    assert command("verify", *args, "--tolerance", f"{name}=0,1000").code == 0
    assert command("verify", *args, "--tolerance", f"{name}=0,1e-3").code == 1
    done = command("verify", *args, "--tolerance", "z=0,1000")
    assert (done.code, "--tolerance names the output 'z', which there is not" in done.err) == (2, True)
    assert command("verify", *args, "--flips", "x").code == 2


@pytest.fixture
def reported(command, finished, write, texts, tmp_path):
    """A report of a comparison that failed."""
    other = write("torch.manual_seed(1)\n" + texts["model"])
    args = ["--no-localise", "-o", "r.json", "-o", "r.xml", "-o", "r.html"]
    done = command("verify", finished / "block.onnx", "--against", other, *args)
    assert done.code == 1
    return tmp_path


def test_reports_are_written(reported):
    assert json.loads((reported / "r.json").read_text())["schema"] == "moe-export/verify-report/2"
    assert ElementTree.parse(reported / "r.xml").find("testsuite").get("failures") != "0"
    assert "<svg" in (reported / "r.html").read_text()


@pytest.mark.slow
def test_judge_reads_a_report_and_runs_nothing(command, reported):
    assert command("judge", "r.json").code == 1
    assert command("judge", "r.json", "--atol", "10000").code == 0
    done = command("judge", "r.json", "--atol", "10000", "--json")
    assert json.loads(done.out)["verdict"] == "equal"
    assert command("judge", "none.json").code == 2
    assert command("judge", "r.xml").code == 2
    assert command("judge", "r.json", "--tolerance", "z=1,1").code == 2
    code = (
        "import sys; [sys.modules.__setitem__(name, None) for name in ('torch', 'onnxruntime', 'onnx')]\n"
        "from moe_export.cli import run; raise SystemExit(run(['judge', 'r.json', '--atol', '10000']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=reported, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_github(command, finished, write, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    other = write("torch.manual_seed(1)\n" + texts["model"], "other.py")
    done = command("verify", finished / "block.onnx", "--against", other)
    line = 1 + other.read_text().splitlines().index("    def forward(self, x):")
    assert f"::error file=other.py,line={line},title=" in done.out
    assert "### ❌" in (tmp_path / "summary.md").read_text()
    done = command("verify", finished / "block.onnx", "--against", other, "--no-github", "--no-localise")
    assert "::error" not in done.out


@pytest.mark.slow
def test_in_half_precision_openvino_is_given_the_models_choices_of_experts(command, tmp_path):
    """Without, a token that ties in half precision goes to another expert, and differs by 0.1."""
    model = Path(__file__).resolve().parents[2] / "models" / "hybrid.py"
    options = ("--target", "openvino", "--dtype", "float16", "--no-gate", "--no-verify", "--quiet")
    assert command(model, "-o", tmp_path, *options).code == 0
    args = ("--against", model, "--dtype", "float16", "--size", "batch=65,sequence=65")
    done = command("verify", tmp_path / "hybrid.onnx@openvino", *args)
    assert done.code == 0, done.out
    assert "tied tokens routed to an equally scored expert" in done.out
