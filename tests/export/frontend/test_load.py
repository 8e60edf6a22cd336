"""The three ways of loading, what goes before what, and what is said when there is no model."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from moe_export.errors import UsageError
from moe_export.export import load_subject
from moe_export.export.frontend.load import split_spec

BLOCK = """
class Block(nn.Module):
    def __init__(self, dim=4, bias=True):
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=bias)

    def forward(self, x, scale=None):
        y = self.linear(x)
        return y if scale is None else y * scale
"""


def message(path, **options):
    with pytest.raises(UsageError) as caught:
        load_subject(str(path), **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "example", "names"),
    [
        ("Block()", "(torch.randn(2, 4),)", ["x"]),
        ("lambda: Block()", "lambda: (torch.randn(2, 4), torch.ones(4))", ["x", "scale"]),
        ("Block()", "{'scale': torch.ones(4), 'x': torch.randn(2, 4)}", ["scale", "x"]),
        ("Block()", "[torch.randn(2, 4)]", ["x"]),
        ("Block()", "torch.randn(2, 4)", ["x"]),
        ("Block", "(torch.randn(2, 4), None)", ["x"]),
        ("functools.partial(Block, 4, bias=False)", "{'x': torch.randn(2, 4)}", ["x"]),
        ("Block()", "(np.ones((2, 4), dtype='float32'),)", ["x"]),
    ],
)
def test_model_and_example_inputs(write, model, example, names):
    head = "import functools\nimport numpy as np\n"
    subject = load_subject(str(write(f"{head}{BLOCK}\nmodel = {model}\nexample_inputs = {example}\n")))
    assert type(subject.module).__name__ == "Block"
    assert list(subject.inputs) == names
    assert subject.how == "`model` and `example_inputs`"
    assert subject.outputs == ("output",)
    assert not subject.module.training


def test_both_names_in_a_function_of_the_file(write):
    text = "def model():\n    return Block()\n\ndef example_inputs():\n    return {'x': torch.randn(3, 4)}\n"
    subject = load_subject(write(BLOCK + text))
    assert subject.inputs["x"].shape == (3, 4)


def test_both_names_imported_from_another_file(write):
    write(BLOCK + "model = Block()\nexample_inputs = (torch.ones(5, 4),)\n", "somewhere_else.py")
    subject = load_subject(str(write("from somewhere_else import *\n")))
    assert subject.inputs["x"].shape == (5, 4)


def test_the_whole_file_runs_where_it_defines_both_names(write):
    """The model may be called (to warm up, to load weights) before it is complete."""
    text = (
        BLOCK
        + "model = Block()\nmodel(torch.ones(9, 4))\nexample_inputs = (torch.ones(2, 4),)\nDONE = True\n"
    )
    subject = load_subject(str(write(text)))
    assert subject.inputs["x"].shape == (2, 4)


def test_a_class_with_its_arguments_and_inputs(write):
    path = write(BLOCK)
    subject = load_subject(
        f"{path}:Block", init=["dim=6", "bias=False"], inputs=["x=2x3x6:float32", "scale=6"]
    )
    assert subject.module.linear.weight.shape == (6, 6)
    assert subject.module.linear.bias is None
    assert {name: tuple(t.shape) for name, t in subject.inputs.items()} == {"x": (2, 3, 6), "scale": (6,)}
    assert subject.how == "the class Block"


def test_a_class_given_by_a_factory_function(write):
    path = write(BLOCK + "def make(dim):\n    return Block(dim)\n")
    assert load_subject(f"{path}:make", init=["dim=3"], inputs=["x=2x3"]).module.linear.in_features == 3


def test_the_first_outermost_call_of_a_script(write):
    text = "net = nn.Sequential(Block(), nn.ReLU())\nx = torch.full((3, 4), 7.0)\nprint(net(x))\nraise SystemError\n"
    subject = load_subject(str(write(BLOCK + text)))
    assert type(subject.module) is nn.Sequential  # not the Block inside it
    assert torch.equal(subject.inputs["input"], torch.full((3, 4), 7.0))
    assert subject.how == "the first module call of the script (Sequential)"


def test_keyword_arguments_of_the_call(write):
    subject = load_subject(str(write(BLOCK + "Block()(scale=torch.ones(4), x=torch.ones(2, 4))\n")))
    assert list(subject.inputs) == ["scale", "x"]


def test_the_call_behind_the_main_guard(write):
    text = "def main():\n    Block()(torch.ones(2, 4))\n\nif __name__ == '__main__':\n    main()\n"
    assert list(load_subject(str(write(BLOCK + text))).inputs) == ["x"]


def test_the_training_loop_after_the_call_is_never_reached(write, tmp_path):
    text = f"""
model = Block()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for step in range(10**9):
    loss = model(torch.ones(2, 4)).sum()
    open({str(tmp_path / "trained")!r}, "w").close()
    loss.backward()
    optimizer.step()
"""
    assert list(load_subject(str(write(BLOCK + text))).inputs) == ["x"]
    assert not (tmp_path / "trained").exists()


def test_an_except_around_the_call_does_not_swallow_it(write):
    text = "try:\n    Block()(torch.ones(2, 4))\nexcept Exception:\n    raise SystemError('swallowed')\n"
    assert list(load_subject(str(write(BLOCK + text))).inputs) == ["x"]


def test_a_script_with_command_line_arguments(write):
    text = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--dim", type=int, default=4)
dim = parser.parse_args().dim
Block(dim)(torch.ones(2, dim))
"""
    assert load_subject(str(write(BLOCK + text))).inputs["x"].shape == (2, 4)


def test_a_script_that_needs_arguments(write, capsys):
    text = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--data', required=True)\np.parse_args()\n"
    path = write(text)
    said = message(path)
    assert f"{path.name} ended itself before it called a module: sys.exit(2)\n  where: {path}:9\n" in said
    assert "a model file is run without arguments; define `model` and `example_inputs`" in said
    assert "--data" in capsys.readouterr().err


def test_sys_exit_with_a_reason(write):
    said = message(write("import sys\nmodel = nn.Linear(4, 4)\nsys.exit('no GPU here')\n"))
    assert "ended itself before it called a module: sys.exit('no GPU here')" in said


def test_sys_exit_zero_ends_the_file_and_no_more(write):
    text = "import sys\nmodel = nn.Linear(4, 4)\nexample_inputs = (torch.ones(2, 4),)\nsys.exit(0)\n"
    assert list(load_subject(str(write(text))).inputs) == ["input"]


def test_model_without_example_inputs(write):
    path = write("model = nn.Linear(4, 4)\n")
    assert message(path) == (
        f"{path.name} defines `model` but no `example_inputs`, and does not call it\n"
        f"  where: {path}\n"
        "  hint: define example_inputs, a tuple or dict of tensors for forward(input: torch.Tensor) -> torch.Tensor"
    )


def test_example_inputs_without_model(write):
    path = write("example_inputs = (torch.ones(2),)\n")
    assert f"{path.name} defines `example_inputs` but no `model`" in message(path)


@pytest.mark.parametrize(("value", "kind"), [("{'weight': 1}", "dict"), ("'bert'", "str")])
def test_model_that_is_none(write, value, kind):
    path = write(f"model = {value}\nexample_inputs = (torch.ones(2),)\n")
    assert f"`model` in {path.name} is a {kind}, not an nn.Module" in message(path)


def test_model_function_that_returns_something_else(write):
    said = message(write("model = lambda: [1]\nexample_inputs = (torch.ones(2),)\n"))
    assert "model() returned list, not an nn.Module" in said


@pytest.mark.parametrize("name", ["model", "example_inputs"])
def test_a_function_that_raises_names_its_line(write, name):
    other = {"model": "example_inputs = ()", "example_inputs": "model = nn.Linear(4, 4)"}[name]
    path = write(f"{other}\ndef {name}():\n    return [][3]\n")
    said = message(path)
    assert f"{name}() raised IndexError: list index out of range\n  where: {path}:8\n" in said


def test_example_inputs_of_another_kind(write):
    assert "example_inputs is a int" in message(write("model = nn.Linear(4, 4)\nexample_inputs = 3\n"))


def test_example_inputs_without_a_tensor(write):
    said = message(write("model = nn.Linear(4, 4)\nexample_inputs = ([1.0], 'x')\n"))
    assert "do not fit Linear.forward" in said
    said = message(write("model = nn.Linear(4, 4)\nexample_inputs = ([1.0],)\n"))
    assert "the example inputs of Linear hold no tensor, but float" in said


def test_two_candidates(write):
    path = write(BLOCK + BLOCK.replace("Block", "Other"))
    said = message(path)
    assert f"cannot tell which model to export: {path.name} has 2 nn.Module classes (Block, Other)" in said
    assert f"pick one: moe-export {path.name}:Block --init ... --input" in said


def test_one_candidate_is_not_guessed_either(write):
    assert "has one nn.Module class (Block)" in message(write(BLOCK))


def test_no_module(write):
    assert "it defines no `model`, no nn.Module class, and calls no module" in message(write("x = 3\n"))
    assert "no model in" in message(write("", header=""))


def test_no_such_class(write):
    said = message(f"{write(BLOCK)}:Blok", inputs=["x=2x4"])
    assert "has no class Blok\n  hint: nn.Module classes in it: Block" in said


def test_a_class_that_is_no_module(write):
    assert "Path in" in message(f"{write('from pathlib import Path')}:Path", inputs=["x=2x4"])


def test_a_class_without_inputs_says_what_forward_takes(write):
    said = message(f"{write(BLOCK)}:Block")
    assert "Block needs example inputs: Block.forward(x, scale=None)" in said
    assert "--input name=2x10x512:float32" in said


def test_a_class_whose_constructor_raises(write):
    path = write(BLOCK)
    said = message(f"{path}:Block", init=["dim=-1"], inputs=["x=2x4"])
    assert "Block(**{'dim': -1}) raised RuntimeError" in said
    assert f"where: {path}:10\n" in said


def test_inputs_without_a_class(write):
    assert "--init and --input go with a class" in message(write(BLOCK), inputs=["x=2x4"])


def test_no_such_file(tmp_path):
    assert message(tmp_path / "none.py") == f"no such file: {tmp_path / 'none.py'}"


def test_a_folder(tmp_path):
    assert "is a folder" in message(tmp_path)


def test_a_syntax_error(write):
    path = write("def f(:\n    pass\n", header="")
    assert message(path) == f"{path.name} has a syntax error: invalid syntax\n  where: {path}:1"


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "model.py"
    path.write_bytes(b"\xff\xfe\x00x")
    assert "as Python source" in message(path)


def test_a_file_that_raises(write):
    path = write("def f():\n    return {}['a']\nf()\n", header="")
    assert message(path) == f"{path.name} raised KeyError: 'a'\n  where: {path}:2"


def test_a_missing_library(write):
    said = message(write("import surely_not_installed\n"))
    assert "No module named 'surely_not_installed'" in said
    assert "install 'surely_not_installed' beside moe-export" in said


@pytest.mark.parametrize(
    ("spec", "name"), [("a/model.py", None), ("a/model.py:Net", "Net"), ("C:/x/model.py", None)]
)
def test_split_spec(spec, name):
    path, found = split_spec(spec)
    assert found == name
    assert path.is_absolute()
    assert path.name == "model.py"


def test_imports_from_its_own_folder_and_lazily(write):
    write("SIZE = 4\n", "sizes_of_mine.py")
    write("FACTOR = 3\n", "late_of_mine.py")
    text = """
from sizes_of_mine import SIZE
class Late(nn.Module):
    def forward(self, x):
        from late_of_mine import FACTOR
        return x * FACTOR
model = Late()
example_inputs = (torch.ones(2, SIZE),)
"""
    subject = load_subject(str(write(text)))
    assert np.array_equal(subject.call([torch.ones(2, 4)])[0].numpy(), np.full((2, 4), 3.0))


def test_a_package_with_relative_imports(write):
    write("", "pack/__init__.py", header="")
    write("", "pack/inner/__init__.py", header="")
    write("SIZE = 6\n", "pack/sizes.py")
    text = "from ..sizes import SIZE\nfrom . import other\nmodel = nn.Linear(SIZE, other.OUT)\n"
    write("OUT = 2\n", "pack/inner/other.py")
    path = write(text + "example_inputs = (torch.ones(3, SIZE),)\n", "pack/inner/model.py")
    assert load_subject(str(path)).call([torch.ones(3, 6)])[0].shape == (3, 2)


@pytest.mark.parametrize("name", ["torch.py", "onnx.py", "torch_model.py", "json.py", "my-model.v2.py"])
def test_a_file_named_like_a_library(write, name, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # a process that a later test starts would import the file
    before = {key: sys.modules.get(key) for key in ("torch", "onnx", "json")}
    path = write("import json\nmodel = nn.Linear(4, 4)\nexample_inputs = (torch.ones(2, 4),)\n", name)
    assert load_subject(str(path)).inputs["input"].shape == (2, 4)
    assert {key: sys.modules.get(key) for key in before} == before


def test_weights_that_nobody_seeds_are_the_same_each_time(tmp_path):
    """Else a graph could not be verified against its file later; the random numbers of others go on as they were."""
    (tmp_path / "model.py").write_text(
        "import random\n\nimport numpy as np\nimport torch\n\n"
        "model = torch.nn.Linear(3, 3)\n"
        "example_inputs = (torch.randn(2, 3) + random.random() + float(np.random.rand()),)\n"
    )
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = (load_subject(str(tmp_path / "model.py")) for _ in range(2))
    assert torch.equal(first.module.weight, second.module.weight)
    assert all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)
    assert torch.equal(torch.get_rng_state(), before)
