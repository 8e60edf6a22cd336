"""Run the command line in this process, on files in a folder of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from moe_export.cli import run

HEADER = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\ntorch.manual_seed(0)\n"
BLOCK = """
class Block(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear(x).relu()
"""
MODEL = BLOCK + "model = Block()\nexample_inputs = (torch.randn(2, 3, 4),)\n"
GATE = """
class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        weights, indices = F.linear(x, self.weight).softmax(-1).topk(2, sorted=False)
        return indices, weights

class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = Gate(), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        indices, weights = self.gate(x)
        shares = (F.one_hot(indices, 4) * weights.unsqueeze(-1)).sum(1)
        return sum(expert(x) * shares[:, n : n + 1] for n, expert in enumerate(self.experts))

model = Moe()
example_inputs = {"x": torch.randn(6, 8)}
"""
_numbers = itertools.count()


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str | None = None, header: str = HEADER) -> Path:
        path = tmp_path / (name or f"net_{next(_numbers)}.py")
        path.write_text(header + textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Run the command in this process, in an empty folder; a traceback fails the test by itself."""
    monkeypatch.chdir(tmp_path)

    def command(*args: object) -> Done:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(code, captured.out, captured.err)

    return command


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


@pytest.fixture
def process(tmp_path):
    """Run the real command in a process of its own."""

    def process(*args: object, **options: object) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "moe_export", *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(),
            timeout=120,
            check=False,
            **options,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return process


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with `block.py`, `moe.py` and their graphs, exported once; tests copy what they change."""
    folder = tmp_path_factory.mktemp("finished")
    for name, text in (("block", MODEL), ("moe", GATE)):
        (folder / f"{name}.py").write_text(HEADER + text)
        assert run([str(folder / f"{name}.py"), "-o", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="session")
def told(tmp_path_factory):
    """The page of `report` on the block with a gate, made once."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "moe.py").write_text(HEADER + GATE)
    assert run(["report", str(folder / "moe.py"), "-o", str(folder / "moe.html"), "--quiet"]) == 0
    return folder / "moe.html"


@pytest.fixture
def older():
    """Write a graph that moe-export exported before; gives its content."""

    def older(path: Path) -> bytes:
        made = onnx.helper.make_model(onnx.helper.make_graph([], "older", [], []), producer_name="moe-export")
        path.write_bytes(made.SerializeToString())
        return path.read_bytes()

    return older


@pytest.fixture(scope="session")
def texts():
    """The model files of this folder's tests."""
    return {"block": BLOCK, "model": MODEL, "gate": GATE}


@pytest.fixture
def listing():
    """What a folder holds, as a sorted list of names, hidden files included."""
    return lambda folder: sorted(path.name for path in folder.iterdir())


@pytest.fixture
def env():
    return environment()
