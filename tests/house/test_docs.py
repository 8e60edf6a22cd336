"""The pages of docs/ that show commands and Python code: each block runs, and prints what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("verify", "guilty", "seeing")]


def blocks(page: Path) -> list[tuple[str, str]]:
    """`(language, text)` of what can be run, in order."""
    return re.findall(r"```(console|python)\n(.*?)```", page.read_text(), re.DOTALL)


def commands(block: str) -> list[tuple[str, str]]:
    """`(command, expected output)` for each `$ ` line."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.split("\n", 1)[0], part.split("\n", 1)[1]) for part in parts]


def matches(expected: str, got: str) -> bool:
    """Whether output is as expected, where `...` stands for any text."""
    pattern = r"[\s\S]*".join(re.escape(piece.strip("\n")) for piece in expected.split("..."))
    return re.fullmatch(rf"\s*{pattern}\s*", got) is not None


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {
        "PATH": path,
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "LANG": os.environ.get("LANG", "C.UTF-8"),
    }
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for language, text in blocks(page):
        if language == "python":
            done = run([sys.executable, "-W", "ignore", "-c", text], tmp_path)
            wanted = "\n".join(re.findall(r"print\(.*\)  # (.*)", text))
            assert (done.returncode, done.stdout.strip()) == (0, wanted), done.stdout + done.stderr
            continue
        for command, expected in commands(text):
            done = run(["bash", "-c", command], tmp_path)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            assert matches(expected, done.stdout), f"{command}\n{done.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_what_can_be_run(page):
    assert len(blocks(page)) >= 2


def test_the_page_on_verify_shows_the_real_tolerances():
    from moe_export.verify import DEFAULTS

    text = (ROOT / "docs" / "verify.md").read_text()
    shown = dict(re.findall(r"^\| (float64|float32|float16|bfloat16) \| (\S+) \|$", text, re.MULTILINE))
    assert {name: float(figure) for name, figure in shown.items()} == {
        name: DEFAULTS[name].rtol for name in ("float64", "float32", "float16", "bfloat16")
    }
    for name in ("float64", "float32", "float16", "bfloat16"):
        assert DEFAULTS[name].rtol == DEFAULTS[name].atol


def test_the_page_on_verify_names_every_kind_of_values_and_every_field():
    from dataclasses import fields

    from moe_export.verify import SCHEMA, Judgement
    from moe_export.verify.regimes import PADDED, REGIMES

    text = (ROOT / "docs" / "verify.md").read_text()
    for name in (*(regime.name for regime in REGIMES), PADDED, SCHEMA, *(f.name for f in fields(Judgement))):
        assert f"`{name}`" in text, name
