"""The wheel under every Python of this machine, with the pinned PyTorch and with the newest on the index.

`make test-matrix`, or `make test-matrix ONLY="3.12 pinned"` for the environments whose name holds one of these. The
wheel is built once, and installed into an environment of its own for each; then it exports and verifies a model, and a
short list of tests runs against it.
One line is printed for each:

    passed   with what pytest counted
    failed   with pytest's last line; the rest is in build/matrix/NAME.log
    absent   pip finds no distribution for this Python
    missing  a Python that is supported and not on this machine

The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "matrix"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("pinned", "newest")


def find_python(version: str) -> Path | None:
    """An interpreter of a version: on the path, or where pyenv keeps them."""
    found = [path] if (path := shutil.which(f"python{version}")) else []
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found += [str(each) for each in sorted(kept.glob(f"{version}.*/bin/python"), reverse=True)]
    for each in found:
        code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
        done = subprocess.run([each, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return Path(each)
    return None


def build_wheel() -> Path:
    """The wheel of this checkout."""
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(BUILD),
    ]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = BUILD.glob("*.whl")
    return wheel


def run(name: str, python: Path, torch: str, wheel: Path, tests: Sequence[str]) -> tuple[str, str]:
    """Install the wheel into an environment of its own, and test it: a word and what there is to say."""
    place, pins = BUILD / name, BUILD / f"{name}.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins.write_text(
        "\n".join(line for line in lines if torch == "pinned" or not line.startswith("torch==")) + "\n"
    )
    own = place / "bin" / "python"
    install = [str(own), "-m", "pip", "install", "-q", "-c", str(pins), "torch", f"{wheel}[dev]"]
    where = "import moe_export, torch; print(torch.__version__, moe_export.__file__)"
    with (BUILD / f"{name}.log").open("w") as log:

        def call(*command: str) -> tuple[int, str]:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            said = done.stdout + done.stderr
            log.write(f"$ {' '.join(command)}\n{said}\n")
            lines = [line for line in said.splitlines() if line.strip()]
            return done.returncode, lines[-1] if lines else ""

        for step in ([str(python), "-m", "venv", "--clear", str(place)], install):
            code, said = call(*step)
            if code:
                # What excludes each other are our own constraints.
                return "failed" if "ResolutionImpossible" in said else "absent", said
        code, said = call(str(own), "-c", where)
        version, _, file = said.partition(" ")
        if code or not file.startswith(str(place)):
            return "failed", f"not the installed wheel: {said}"
        job = [str(place / "bin" / "moe-export"), str(ROOT / "models" / "sparse_moe.py"), "-q"]
        code, said = call(*job, "-o", str(place / "out"))
        if code:
            return "failed", f"{' '.join(job)}: {said}"
        code, said = call(str(own), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    return ("failed" if code else "passed"), f"torch {version}: {said}"


def environments(only: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """`(name, Python, PyTorch)` of those that were asked for."""
    for python in PYTHONS:
        for torch in TORCHES:
            name = f"{python}-{torch}"
            if all(part in name for part in only):
                yield name, python, torch


def main() -> int:
    """Run the environments; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="names that hold all of these")
    parser.add_argument("tests", nargs="+", help="what pytest is given")
    asked = parser.parse_args()
    wheel, failed = build_wheel(), False
    for name, version, torch in environments(asked.only):
        python = find_python(version)
        word, said = (
            ("missing", f"no Python {version} on this machine")
            if python is None
            else run(name, python, torch, wheel, asked.tests)
        )
        print(f"{word:8} {name}: {re.sub('=+', '', said).strip()}", flush=True)
        shutil.rmtree(BUILD / name, ignore_errors=True)  # an environment takes up to 6 GB
        failed |= word == "failed"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
