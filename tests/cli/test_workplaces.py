"""Where people work: the pytest plugin, the composite action, the pre-commit hook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_export.cli import run
from moe_export.equivalence import assert_equivalent as equivalent
from moe_export.errors import UsageError

ROOT = Path(__file__).parents[2]


def run_pytest(folder, *args):
    # The folder is outside this repository, so its own settings do not apply.
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, args)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        check=False,
    )


def test_models_become_tests(write, texts, tmp_path):
    good = write(texts["model"], "good.py")
    bad = write("class Net(nn.Module):\n    pass\n", "bad.py")
    done = run_pytest(tmp_path, "--moe-export", good.name, "--moe-export", bad.name)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "moe-export bad.py exits with 2" in done.stdout
    assert "Traceback" not in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".onnx") == []


@pytest.mark.slow
def test_options_of_the_export_reach_it(write, texts, tmp_path):
    write(texts["model"], "good.py")
    done = run_pytest(tmp_path, "--moe-export", "good.py", "--moe-export-args", "--opset 3")
    assert done.returncode == 1
    assert "opset 3" in done.stdout


@pytest.mark.slow
def test_the_fixture_in_a_run_of_its_own(write, finished, tmp_path):
    write(
        f"""
        import sys
        sys.path.insert(0, {str(finished)!r})
        from block import model

        def test_right(assert_equivalent):
            assert_equivalent(model, torch.randn(2, 3, 4), {str(finished / "block.onnx")!r})

        def test_wrong(assert_equivalent):
            other = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            assert_equivalent(other, torch.randn(2, 3, 4), {str(finished / "block.onnx")!r})
        """,
        "test_mine.py",
    )
    done = run_pytest(tmp_path, "test_mine.py")
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "onnxruntime-cpu against torch: not equal" in done.stdout


@pytest.fixture
def graph(tmp_path):
    """A module with a dropout, and its graph as PyTorch writes it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    path = tmp_path / "net.onnx"
    with torch.no_grad():
        torch.onnx.export(
            module.eval(),
            (torch.randn(2, 4),),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
            verbose=False,
        )
    return module, path


@pytest.mark.filterwarnings("ignore")
def test_assert_equivalent(assert_equivalent, graph):
    module, path = graph
    module.train()
    report = assert_equivalent(module, {"input": torch.randn(2, 4)}, path)
    assert report.verdict == "equal"
    assert module.training
    assert module[1].training
    with torch.no_grad():
        module[0].weight[0, 0] += 1e-3
    with pytest.raises(AssertionError, match="not what Sequential computes"):
        equivalent(module, (torch.randn(2, 4),), path)
    assert equivalent(module, torch.randn(2, 4), path, atol=1.0).verdict == "equal"
    with pytest.raises(UsageError, match="neither a graph nor an engine"):
        equivalent(module, torch.randn(2, 4), path.with_suffix(".txt"))


def test_the_plugin_is_lean():
    code = "import sys, moe_export.pytest_plugin; print(*({'torch', 'onnx', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def steps_of_the_action() -> dict[str, str]:
    """The scripts of the action's steps, by name."""
    text = (ROOT / "action.yml").read_text()
    found = re.findall(
        r"- name: (\w+)\n(?:.*\n)*?\s+run: (?:\|\n((?:\s{8}.*\n)+)|(.*)\n)", text, re.MULTILINE
    )
    return {name: block or line for name, block, line in found}


@pytest.mark.parametrize("graph", [pytest.param("", marks=pytest.mark.slow), "block.onnx"])
def test_the_action_verifies_and_writes_reports(finished, tmp_path, graph, env):
    script = steps_of_the_action()["verify"]
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            **env,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GRAPH": str(finished / graph) if graph else "",
            "MODEL": str(finished / "block.py"),
            "ARGUMENTS": "--seed 2 --seeds 2",
            "REPORTS": "reports",
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        },
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path.name for path in (tmp_path / "reports").iterdir()}
    if graph:
        assert written == {"report.json", "report.xml", "report.html"}
    else:
        assert {"block.onnx", "block.report.json", "report.xml", "report.html"} <= written
    assert "✅" in (tmp_path / "summary.md").read_text()


def test_the_action_declares_what_its_script_reads():
    text = (ROOT / "action.yml").read_text()
    inputs = set(re.findall(r"^  ([a-z-]+):$", text.split("runs:")[0], re.MULTILINE))
    assert inputs == set(re.findall(r"inputs\.([a-z-]+)", text))
    assert "GITHUB_ACTION_PATH" in steps_of_the_action()["install"]


def hook_entry() -> str:
    return re.search(r"entry: (.*)", (ROOT / ".pre-commit-hooks.yaml").read_text())[1]


def test_the_hook_fails_where_an_einsum_is_left(write, tmp_path, env):
    write("y = torch.einsum('bld,bln->bldn', a, b)\n", "left.py")
    write("y = a.unsqueeze(-1) * b\n", "clean.py")
    program = [sys.executable, "-m", *hook_entry().replace("moe-export", "moe_export").split()]
    for files, code in ((["clean.py"], 0), (["clean.py", "left.py"], 1), (["left.py", "clean.py"], 1)):
        done = subprocess.run(
            [*program, *files], cwd=tmp_path, capture_output=True, text=True, env=env, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr


def test_the_hook_prints_what_it_found_and_nothing_of_the_rest(write, tmp_path, env):
    write("import torch\ny = torch.einsum('bld,bln->bldn', a, b)\n", "left.py", header="")
    write("y = a.unsqueeze(-1) * b\n", "clean.py", header="")
    done = lean([[*hook_entry().split()[1:], "clean.py", "left.py"]], hook_packages(), tmp_path, env)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        "left.py:2: to rewrite: 'bld,bln->bldn' → a.unsqueeze(-1) * b.unsqueeze(2)",
        "1 to rewrite, 0 left alone",
    ]


LEAN = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
from moe_export.cli import run
sys.exit(max([run(words) for words in {commands}]))
"""


def modules_of(packages) -> set[str]:
    """What packages are imported as."""
    named = {re.match(r"[\w.-]+", each)[0].replace("-", "_") for each in packages if each[0].isalpha()}
    return {{"onnxruntime_gpu": "onnxruntime"}.get(each, each) for each in named}


def lean(commands, packages, folder, env):
    """Run commands where none of our dependencies is installed but these."""
    needed = [line for line in metadata.requires("moe-export") if "extra ==" not in line]
    absent = modules_of(needed) - modules_of(packages)
    assert "torch" in absent
    code = LEAN.format(absent=absent, commands=[[str(word) for word in words] for words in commands])
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=env, check=False
    )


def hook_packages() -> list[str]:
    text = (ROOT / ".pre-commit-hooks.yaml").read_text()
    return re.findall(r"^    - ([a-z].*)$", text, re.MULTILINE)


def packages_of_the_page() -> list[str]:
    text = (ROOT / "docs" / "tasks" / "check-in-ci.md").read_text()
    return re.search(r"`pip install (click .*?)`", text)[1].split()


def test_graphs_are_compared_without_pytorch(finished, tmp_path, env):
    """With what the page installs; whatever needs more says what is missing."""
    packages = [*packages_of_the_page(), "ml_dtypes"]  # which onnx brings
    graph, golden = finished / "block.onnx", tmp_path / "golden.safetensors"
    model = finished / "block.py"
    assert run(["verify", str(model), "--record", str(golden), "--quiet"]) == 0
    commands = [
        ["verify", graph, "--against", golden, "-o", "r.xml", "-o", "r.html", "-o", "r.json"],
        ["verify", graph, "--against", graph],
        ["judge", "r.json"],
        ["diff", graph, finished / "moe.onnx"],
        ["check", graph],
        ["view", graph, "-o", "graph.svg"],
        ["rewrite", graph, "-o", "rewritten.onnx"],
    ]
    done = lean(commands, packages, tmp_path, env)
    assert done.returncode == 0, done.stderr
    done = lean([[model], ["verify", graph, "--against", model]], packages, tmp_path, env)
    assert done.returncode == 4
    assert done.stderr.count("error: this needs torch, which is not installed\n  hint: pip install") == 2


def test_several_files_need_a_way_to_be_written(command, write):
    one, two = write("x = 1\n"), write("x = 2\n")
    done = command("rewrite", one, two)
    assert (done.code, "several files go with --check" in done.err) == (2, True)
