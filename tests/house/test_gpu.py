"""`make gpu`: rehearsed with the CPU in the GPU's place; and its page names every test that needs a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from pages import ROOT

SCRIPT = ROOT / "tests" / "gpu" / "run.py"
PAGE = ROOT / "docs" / "gpu.md"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_page_names_each_file_with_such_tests():
    mark = "pytest.mark." + "gpu"
    marked = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "tests").rglob("test_*.py")
        if mark in file.read_text(encoding="utf-8")
    }
    told = set(re.findall(r"^\| `(tests/\S+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert told == marked


def test_the_parts_fit_into_ten_minutes():
    seconds = re.search(r"^SECONDS = (\{.*\})$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert seconds is not None
    found = json.loads(seconds[1])
    assert sum(found.values()) <= 540
    text = PAGE.read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| (\w+) \| (\d+) \|", text, re.MULTILINE)) == {
        name: str(each) for name, each in found.items()
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    done = run("--build", str(tmp_path))
    assert done.returncode == 4
    assert "no GPU that PyTorch can use" in done.stderr
    assert "--cpu" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_writes_both_files_and_leaves_the_page(tmp_path):
    before = PAGE.read_text(encoding="utf-8")
    done = run("--cpu", "--small", "--build", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert PAGE.read_text(encoding="utf-8") == before
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text.startswith("**no GPU: the CPU in its place**")
    document = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert document["schema"] == "moe-export/gpu/1"
    assert document["seconds"] < 600
    parts = document["parts"]
    assert list(parts) == ["tests", "models", "experts", "recurrences", "engines"]
    assert all(part["rows"] or part["cut"] for part in parts.values())
    assert {row["outcome"] for row in parts["tests"]["rows"]} <= {"skipped"}
    for name in ("models", "experts", "recurrences"):
        for row in parts[name]["rows"]:
            assert all(found < 1e-5 for found in row["differences"].values()), row
            assert row["bound_ms"] > 0
    assert "built, not run: no GPU" in {row["status"] for row in parts["engines"]["rows"]}


@pytest.mark.slow
def test_what_the_time_did_not_allow_is_named(tmp_path):
    done = run("--cpu", "--small", "--only", "experts", "--share", "0.001", "--build", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "Cut, as the time was over: 8 experts" in text
