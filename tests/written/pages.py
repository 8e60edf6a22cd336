"""The pages of this repository as programs: what can be run in them, and what it should print.

A block of `console` is run command by command. What follows a command is its output; `...` stands for any text.
A block of `python` is run as a script of its own, and prints what stands behind its `print(...)  # `; but if its first
line is a file's name, `# my_moe.py`, it is that file. All blocks of a page run in order, in one folder that holds the
repository's models.

`moe-export ...` runs in this process where a shell adds no more than an `echo`, and Python in a fork of one that has
imported PyTorch, which saves importing it; anything else is a process of its own. Of `make` only the recipe's last
line is run, since the steps before it install, and of what tests and checks the repository itself it is only seen that
`make` knows it: it would run this very test.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import warm_python

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PAGES = tuple(sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]))
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# ([\w/]+\.py)\n")
_SHELL = re.compile(r"[;&|<>$*`]")
_ECHO = re.compile(r'^(?P<ours>.*?)(?: (?P<when>\|\||&&) echo "(?P<words>[^"$]*)"|; echo "exit code \$\?")$')
_OF_THE_REPOSITORY = (
    "test",
    "test-slow",
    "test-slow-share",
    "bench",
    "gpu",
    "compare",
    "lint",
    "types",
    "docs",
    "install",
)


def name_of(page: Path) -> str:
    """How tests call a page."""
    return page.relative_to(ROOT).with_suffix("").as_posix()


def fences(page: Path) -> list[tuple[str, str]]:
    """`(language, text)` of every block between fences."""
    return _FENCE.findall(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[tuple[str, str]]:
    """`(language, text)` of what can be run, in order."""
    return [(language, text) for language, text in fences(page) if language in ("console", "python")]


def commands(block: str) -> list[tuple[str, str]]:
    """`(command, expected output)` for each `$ ` line of a console block."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.split("\n", 1)[0], part.split("\n", 1)[1]) for part in parts]


def matches(expected: str, got: str) -> bool:
    """Whether output is as expected, where `...` stands for any text."""
    pattern = r"[\s\S]*".join(re.escape(piece.strip("\n")) for piece in expected.split("..."))
    return re.fullmatch(rf"\s*{pattern}\s*", got) is not None


@dataclass(frozen=True)
class Step:
    """One thing that a page tells its reader to do.

    Attributes:
        kind: `command`, `script` or `file`.
        text: The command line or the Python code.
        expected: What it prints; of a file, its name.
    """

    kind: str
    text: str
    expected: str


def steps(page: Path) -> Iterator[Step]:
    """All that a page tells its reader to do, in order."""
    for language, text in blocks(page):
        named = _FILE.match(text)
        if language == "console":
            yield from (Step("command", *pair) for pair in commands(text))
        elif named:
            yield Step("file", text, named[1])
        else:
            yield Step("script", text, "\n".join(re.findall(r"print\(.*\)  # (.*)", text)))


def prepare(folder: Path) -> Path:
    """Put there what a page starts from."""
    shutil.copytree(ROOT / "models", folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def follow(step: Step, folder: Path) -> None:
    """Do what a page says, and see that it comes out as the page says.

    Raises:
        AssertionError: It does not.
    """
    if step.kind == "file":
        path = folder / step.expected
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(step.text, encoding="utf-8")
        return
    if step.kind == "script":
        done = _python(["-W", "ignore", "-c", step.text], folder)
        assert (done[0], done[1].strip()) == (0, step.expected), f"{step.text}\n{done[1]}{done[2]}"
        return
    line = step.text.replace(".venv/bin/", "")  # where `make` installs
    if line.startswith("make "):
        target = line.split()[1]
        line = _recipe(target)
        if target in _OF_THE_REPOSITORY:
            return
    echo = _ECHO.match(line)
    if echo and _is_ours(echo["ours"]):
        done = _with_echo(echo, folder)
    elif _is_ours(line):
        done = _here(line, folder)
    elif line.startswith("python ") and not _SHELL.search(line):
        done = _python(shlex.split(line)[1:], folder)
    else:
        done = _process(["bash", "-c", line], folder)
    assert done[0] == 0, f"{line}\n{done[1]}{done[2]}"
    assert matches(step.expected, done[1]), f"{line}\n{done[1]}"


def _with_echo(echo: re.Match[str], folder: Path) -> tuple[int, str, str]:
    """What a shell makes of `command; echo "exit code $?"`, `command || echo "words"` and `command && echo "words"`."""
    code, out, err = _here(echo["ours"], folder)
    if echo["when"] is None:
        return 0, f"{out}exit code {code}\n", err
    if (code == 0) == (echo["when"] == "&&"):
        return 0, f"{out}{echo['words']}\n", err
    return code, out, err


def _is_ours(line: str) -> bool:
    return line.startswith("moe-export ") and not _SHELL.search(re.sub(r'"[^"]*"', "", line))


def _here(line: str, folder: Path) -> tuple[int, str, str]:
    from moe_export.cli import run

    out, err = io.StringIO(), io.StringIO()
    with _inside(folder), redirect_stdout(out), redirect_stderr(err):
        code = run(shlex.split(line)[1:])
    return code, out.getvalue(), err.getvalue()


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _python(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    return warm_python.run(arguments, folder, _environment(folder))


def _process(command: list[str], folder: Path) -> tuple[int, str, str]:
    env = _environment(folder)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, check=False)
    return done.returncode, done.stdout, done.stderr


def _environment(folder: Path) -> dict[str, str]:
    return {
        "PATH": f"{BIN}:/usr/bin:/bin",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        **{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},
    }


def _recipe(target: str) -> str:
    """The command that a make target ends in."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "--no-print-directory", target]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=outside)
    return shown.stdout.splitlines()[-1].replace(".venv/bin/", "")
