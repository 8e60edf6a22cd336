"""Every command in the README runs and prints what the README says.

A console block is run line by line, in order, in one copy of the repository's models. What follows a command is
its output; `...` stands for anything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def console_blocks(text: str) -> list[str]:
    return re.findall(r"```console\n(.*?)```", text, re.DOTALL)


def commands(block: str) -> list[tuple[str, str]]:
    """`(command, expected output)` for each `$ ` line of a block."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.split("\n", 1)[0], part.split("\n", 1)[1]) for part in parts]


def matches(expected: str, got: str) -> bool:
    """Whether output is as expected, where `...` stands for any text."""
    pattern = r"[\s\S]*".join(re.escape(piece.strip("\n")) for piece in expected.split("..."))
    return re.fullmatch(rf"\s*{pattern}\s*", got) is not None


def recipe(target: str) -> str:
    """The command that a make target ends in. Its installing steps ran before these tests could."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "--no-print-directory", target]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=outside)
    return shown.stdout.splitlines()[-1].replace(".venv/bin/", "")


@pytest.fixture
def place(tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


BLOCKS = console_blocks(README)


def test_the_readme_has_commands():
    assert len([command for block in BLOCKS for command in commands(block)]) >= 4


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n", 1)[0][2:50])
def test_the_commands_of_the_readme_run(block, place):
    for command, expected in commands(block):
        if command == "make test":
            assert "pytest" in recipe("test")  # this very run
            continue
        line = recipe("demo") if command == "make demo" else command
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=place,
            capture_output=True,
            text=True,
            env={"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(place), "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert matches(expected, done.stdout), done.stdout
