"""Everything that a user can get wrong: one clear message, the right exit code, and nothing half written."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.fixture
def refused(command, listing, tmp_path):
    """Run a command that must fail; the lines that it says, and nothing may have been written."""

    def refused(code, *args):
        before = listing(tmp_path)
        done = command(*args)
        assert done.code == code, done.err
        assert done.out == ""
        assert listing(tmp_path) == before
        found = done.err.partition("error: ")[2]
        assert found
        return found.splitlines()

    return refused


def test_no_such_file(refused, tmp_path):
    assert refused(2, "none.py") == [f"no such file: {tmp_path / 'none.py'}"]


def test_a_command_with_a_letter_wrong(command, tmp_path, monkeypatch):
    done = command("verfy", "model.onnx")
    assert done.code == 2
    assert "No such command 'verfy'. Did you mean 'verify'?" in done.err
    (tmp_path / "verfy").write_text("")  # a file of that name is a file
    monkeypatch.chdir(tmp_path)
    assert "Did you mean" not in command("verfy").err


def test_a_folder(refused, tmp_path):
    assert refused(2, tmp_path)[0] == f"{tmp_path} is a folder without config.json"


def test_a_syntax_error(refused, write):
    path = write("class A\n", "net.py", header="")
    assert refused(2, path) == ["net.py has a syntax error: expected ':'", f"  where: {path}:1"]


def test_no_module(refused, write):
    path = write("x = 3\n", "net.py")
    assert refused(2, path) == [
        "no model in net.py: it defines no `model`, no nn.Module class, and calls no module",
        "  hint: define `model` (an nn.Module) and `example_inputs` (a tuple or dict of tensors)",
    ]


def test_two_candidates(refused, write, texts):
    path = write(texts["block"] + texts["block"].replace("Block", "Other"), "net.py")
    assert refused(2, path) == [
        "cannot tell which model to export: net.py has 2 nn.Module classes (Block, Other) "
        "but neither `model` and `example_inputs` nor a call of a module",
        "  hint: pick one: moe-export net.py:Block --init ... --input name=2x10x512:float32",
    ]


def test_model_without_example_inputs(refused, write, texts):
    path = write(texts["block"] + "model = Block()\n", "net.py")
    assert refused(2, path) == [
        "net.py defines `model` but no `example_inputs`, and does not call it",
        f"  where: {path}",
        "  hint: define example_inputs, a tuple or dict of tensors for forward(x)",
    ]


def test_forward_raises(refused, write):
    text = """
    class Net(nn.Module):
        def forward(self, x):
            raise ValueError("length 3 is odd")
    model = Net()
    example_inputs = (torch.ones(2, 3),)
    """
    path = write(text, "net.py")
    assert refused(2, path) == [
        "Net.forward raised ValueError: length 3 is odd",
        f"  where: {path}:9",
        "  hint: it was called with the example inputs (2, 3) float32; do they have the right shapes and dtypes?",
    ]


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (
            "{'y': torch.ones(2, 3, 4)}",
            "the example inputs do not fit Block.forward(x): missing a required argument: 'x'",
        ),
        (
            "(torch.ones(2, 3, 5),)",
            "Block.forward raised RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            "(torch.ones(2, 3, 4, dtype=torch.int64),)",
            "Block.forward raised RuntimeError: mat1 and mat2 must have the same",
        ),
        ("('text',)", "the example inputs of Block hold no tensor, but str"),
        ("3", "example_inputs is a int"),
    ],
    ids=["name", "shape", "dtype", "no tensor", "no tuple"],
)
def test_wrong_example_inputs(refused, write, texts, example, said):
    path = write(texts["block"] + f"model = Block()\nexample_inputs = {example}\n")
    assert refused(2, path)[0].startswith(said)


@pytest.mark.parametrize("opset", ["16", "0", "-3", "9999"])
def test_an_opset_out_of_range(refused, write, texts, opset):
    lines = refused(2, write(texts["model"]), "--opset", opset)
    assert lines[0] == f"opset {opset} is out of range"
    assert lines[1].startswith("  hint: choose 17 to ")


def test_an_operator_without_onnx_form(refused, write):
    text = """
    class Net(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)
    model = Net()
    example_inputs = (torch.ones(2, 3),)
    """
    path = write(text, "net.py")
    assert refused(3, path) == [
        "operator aten.special_bessel_j0 has no ONNX form [MX301]",
        f"  where: {path}:9",
        "  return torch.special.bessel_j0(x)",
        "  hint: write that line with other PyTorch operators",
        "  why: moe-export explain MX301",
    ]


def test_data_dependent_control_flow(refused, write):
    text = """
    class Net(nn.Module):
        def forward(self, x):
            rows = []
            for _ in range(int(x.sum())):
                rows.append(x)
            return torch.cat(rows)
    model = Net()
    example_inputs = (torch.ones(2, 3),)
    """
    path = write(text, "net.py")
    lines = refused(3, path)
    assert lines[0].startswith("torch.export cannot trace Net: ")
    assert lines[1] == f"  where: {path}:10"
    assert "write it with torch.where, masks, or a loop over all experts" in lines[2]


def test_a_random_model(refused, write):
    text = "class Net(nn.Module):\n    def forward(self, x):\n        return F.dropout(x, 0.5)\n"
    path = write(f"{text}model = Net()\nexample_inputs = (torch.ones(20, 30),)\n", "net.py")
    lines = refused(3, path)
    said = "Net gives other outputs at every call: aten.native_dropout.default draws random numbers"
    assert lines[0] == f"{said} [MX103]"
    assert lines[1] == f"  where: {path}:8"


def test_a_kernel_that_onnxruntime_lacks(refused, command, write, tmp_path):
    text = "class Net(nn.Module):\n    def forward(self, x):\n        return torch.where(x > 1, x, -x)\n"
    example = "example_inputs = (torch.ones(4, 3, dtype=torch.int16),)\n"
    path = write(f"{text}model = Net()\n{example}", "net.py")
    lines = refused(4, path)
    assert lines[0].startswith("net.onnx cannot be verified: onnxruntime on cpu has no ")
    assert "--no-verify writes it unverified" in lines[1]
    done = command(path, "--no-verify")
    assert done.code == 0
    assert "note: onnxruntime on cpu cannot run it: it has no " in done.out
    assert (tmp_path / "net.onnx").is_file()


def test_a_model_in_bfloat16_is_verified_although_onnxruntime_cannot_run_it(command, write, texts):
    text = texts["model"].replace("Block()", "Block().bfloat16()").replace("3, 4)", "3, 4).bfloat16()")
    path = write(text, "net.py")
    done = command(path)
    assert done.code == 0, done.err
    assert "onnxruntime-cpu, rounding to bfloat16 matches torch" in done.out
    done = command(path, "--no-verify", "--force")
    assert "note: onnxruntime on cpu cannot run it: it has no " in done.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dynamic", "y:0"], "--dynamic 'y:0': no input 'y'"),
        (["--dynamic", "x:7"], "--dynamic 'x:7': x has 3 dimensions, counted from 0"),
        (["--dynamic", "x"], "--dynamic 'x' is not input:axis=name"),
        (["--gate", "layers.0"], "no gate in module 'layers.0'"),
        (["--init", "dim=4"], "--init and --input go with a class"),
    ],
)
def test_options_that_make_no_sense(refused, write, texts, options, said):
    assert refused(2, write(texts["model"]), *options)[0] == said


def test_a_dimension_that_cannot_be_dynamic(refused, write, texts):
    lines = refused(3, write(texts["model"]), "--dynamic", "x:2=width")
    assert lines[0].startswith("dimension 2 of x cannot be dynamic: it is fixed at 4 by the model")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--opset", "x"], "Invalid value for '--opset': 'x' is not a valid integer."),
        (
            ["--backend", "tpu"],
            "'tpu' is not one of 'onnxruntime-cpu', 'onnxruntime-cuda', 'onnxruntime-tensorrt'.",
        ),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_options_of_the_wrong_kind(command, write, texts, args, said):
    done = command(write(texts["model"]), *args)
    assert done.code == 2
    assert said in done.err


def test_a_missing_argument(command):
    done = command("export")
    assert done.code == 2
    assert "no model is named" in done.err


def test_a_file_in_the_output_folders_place(command, write, listing, tmp_path, texts):
    (tmp_path / "out").write_text("mine")
    done = command(write(texts["model"], "net.py"), "-o", "out")
    assert done.code == 2
    assert f"error: cannot write to {tmp_path / 'out'}: File exists\n" in done.err
    assert "choose another folder with -o" in done.err
    assert (tmp_path / "out").read_text() == "mine"
    assert "tracing" not in done.err  # found before the work is done, not after


def test_a_file_among_the_folders_parents(refused, write, texts, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refused(2, write(texts["model"]), "-o", "file/out")[0]


LIMITED = """
import resource, sys
from moe_export.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(run(sys.argv[1:]))
"""


def test_a_disk_that_fills_up(write, older, listing, tmp_path, env):
    """The weights do not fit: an older graph stays, and nothing of the new one does."""
    text = "model = nn.Linear(200, 200)\nexample_inputs = (torch.ones(2, 200),)\n"
    path = write(text, "net.py")
    good = older(tmp_path / "net.onnx")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), "-o", str(tmp_path), "--no-verify", "--no-simplify"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert f"error: cannot write to {tmp_path}: File too large" in done.stderr
    assert "or make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == ["net.onnx", "net.py"]
    assert (tmp_path / "net.onnx").read_bytes() == good


def test_debug_shows_the_traceback(write):
    from moe_export.cli import run
    from moe_export.errors import UsageError

    with pytest.raises(UsageError, match="no such file"):
        run(["none.py", "--debug"])


def test_cuda_on_a_machine_without(refused, write, texts):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    lines = refused(4, write(texts["model"]), "--backend", "onnxruntime-cuda")
    assert "cuda" in lines[0]


def test_modules_that_stay_float32_are_there(command, write, texts, listing, tmp_path):
    path = write(texts["model"], "net.py")
    done = command(path, "--dtype", "float16", "--float32", "nowhere")
    assert done.code == 2
    assert "--float32 nowhere: no operator of the graph is of a module of this path" in done.err
    assert "modules of the graph: linear" in done.err
    assert "--float32 goes with --dtype" in command(path, "--float32", "linear").err
    assert listing(tmp_path) == ["net.py"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--report", "found.json"], "--report writes a .xml or .html file, not found.json"),
        (["--report", "found.xml", "--no-verify"], "--no-verify compares nothing"),
    ],
)
def test_reports_that_say_nothing(refused, write, texts, options, says):
    assert says in refused(2, write(texts["model"], "net.py"), *options)[0]
