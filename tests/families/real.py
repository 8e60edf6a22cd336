"""Modules of packages that people install, exported as they are: `make real`, or `python tests/families/real.py`.

Each entry of `real.toml` names a package with its version, imports a module from it, and makes the module and its
example inputs. An entry becomes a model file, as a user would write it; `moe-export` exports and verifies it in a
process of its own; and the graph is compared with PyTorch by `real_check.py`, which shares no code with moe-export.

One line is printed for each:

    right      at every size that was tried within those that the graph claims
    refused    with the message's first line, and the entry's `why`
    wrong      different from PyTorch, or found "not equal" by moe-export itself
    traceback  an error of moe-export that is no message, or a crash
    unfinished no answer within the time limit
    absent     the package cannot be installed

and whether PyTorch's own exporter takes the module. The exit code is 1 if anything is wrong, a traceback, unfinished,
or refused although PyTorch's exporter takes it. Packages are installed without their dependencies, each into a folder
of its own in `build/real`; what else they import is named in the table `packages`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "real"
LIMIT = 900.0
"""Seconds for one process. The slowest entry needs a third of it."""
FAILED = ("wrong", "traceback", "unfinished")


@dataclass(frozen=True)
class Entry:
    """One module to export.

    Attributes:
        name: What `--only` takes: the package and the class.
        package: The distribution that holds it, a key of the table `packages`.
        code: The model file: imports, `model`, `example_inputs`.
        sizes: The sizes to try for each dimension that is free; none are the usual ones.
        why: What explains a refusal.
    """

    name: str
    package: str
    code: str
    sizes: tuple[int, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of an entry: the word, what there is to say, and what PyTorch's exporter does with it."""

    word: str
    text: str
    torch: str = ""


def read() -> tuple[dict[str, dict[str, object]], list[Entry]]:
    """The packages and the entries of `real.toml`."""
    table = tomllib.loads((HERE / "real.toml").read_text())
    entries = []
    for each in table["module"]:
        lines = [
            "import torch",
            "",
            each["imports"],
            "",
            "torch.manual_seed(0)",
            each.get("code", "").strip(),
        ]
        lines += [f"model = {each['model']}", f"example_inputs = {each['inputs']}", ""]
        sizes = tuple(each.get("sizes", ()))
        name = f"{each['package']}:{each['name']}"
        entries.append(Entry(name, each["package"], "\n".join(lines), sizes, each.get("why", "")))
    return table["packages"], entries


def folders(package: str, packages: dict[str, dict[str, object]]) -> list[Path]:
    """The folders of a package and of what it needs, installed where they are not.

    Raises:
        subprocess.CalledProcessError: pip could not install one.
    """
    found = []
    for name in (package, *packages[package].get("needs", ())):  # type: ignore[misc]
        version = str(packages[name]["version"])
        folder = BUILD / "packages" / f"{name}-{version}"
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
            command += ["--no-compile", "--disable-pip-version-check", "--target", str(partial)]
            subprocess.run([*command, f"{name}=={version}"], check=True, capture_output=True, text=True)
            partial.rename(folder)
        found.append(folder)
    return found


def run(entry: Entry, packages: dict[str, dict[str, object]], limit: float = LIMIT) -> Outcome:
    """Export an entry, compare its graph, and ask PyTorch's exporter."""
    try:
        paths = folders(entry.package, packages)
    except subprocess.CalledProcessError as error:
        return Outcome("absent", last_line(error.stderr))
    place = BUILD / "models" / entry.name.replace(":", "-")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "model.py").write_text(entry.code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}

    def call(*command: str) -> subprocess.CompletedProcess[str] | None:
        try:
            return subprocess.run(
                [sys.executable, *command],
                cwd=place,
                env=environment,
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None

    check = (str(HERE / "real_check.py"), "model.py")
    built = call(*check, "--only-build")
    if built is None or built.returncode:
        return Outcome("wrong", f"the entry itself fails: {last_line(built.stderr) if built else 'too slow'}")
    exported = call("-m", "moe_export", "model.py", "-o", "out")
    if exported is None:
        return Outcome("unfinished", f"moe-export gave no answer in {limit:.0f} s")
    (place / "log.txt").write_text(exported.stdout + exported.stderr)
    torchs = last_line(answer.stdout) if (answer := call(*check, "--torch")) else "too slow"
    word, text = of_export(exported)
    if word == "right":
        sizes = ",".join(map(str, entry.sizes))
        compared = call(*check, "--graph", "out/model.onnx", *(("--sizes", sizes) if sizes else ()))
        if compared is None:
            return Outcome("unfinished", "the comparison took too long", torchs)
        if compared.returncode:
            return Outcome("wrong", f"the comparison failed: {last_line(compared.stderr)}", torchs)
        found = json.loads(last_line(compared.stdout))
        word, text = ("wrong" if found["wrong"] else "right"), found["text"]
    return Outcome(word, text, torchs)


def of_export(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """The word for what the command printed and returned, and its message."""
    said = done.stdout + done.stderr
    if "Traceback (most recent call last)" in said or done.returncode not in (0, 1, 2, 3, 4, 5):
        return "traceback", f"exit code {done.returncode}: {last_line(said)}"
    if done.returncode == 0:
        return "right", ""
    lines = [line.strip() for line in said.splitlines()]
    message = next((line for line in lines if line.startswith(("error:", "not equal"))), last_line(said))
    return {1: "wrong", 5: "unfinished"}.get(done.returncode, "refused"), f"exit {done.returncode}: {message}"


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def report(entry: Entry, outcome: Outcome, version: object, seconds: float) -> str:
    """The lines for an entry."""
    line = f"{outcome.word:10} {entry.name} {version}: {outcome.text}"
    line += f"; torch.onnx.export: {outcome.torch}" if outcome.torch else ""
    why = f"\n{'':10} why: {entry.why}" if entry.why and outcome.word == "refused" else ""
    return f"{line} ({seconds:.0f} s){why}"


def results(
    entries: Sequence[Entry], packages: dict[str, dict[str, object]], limit: float
) -> Iterator[Outcome]:
    """What comes of each, printed as it comes."""
    for entry in entries:
        start = time.monotonic()
        outcome = run(entry, packages, limit)
        version = packages[entry.package]["version"]
        print(report(entry, outcome, version, time.monotonic() - start), flush=True)
        yield outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the entries and count; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="entries whose name holds one of these",
    )
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one process")
    asked = parser.parse_args(arguments)
    packages, entries = read()
    chosen = [entry for entry in entries if not asked.only or any(part in entry.name for part in asked.only)]
    if not chosen:
        parser.error(f"no entry is called {' or '.join(asked.only)}")
    if asked.list:
        print("\n".join(entry.name for entry in chosen))
        return 0
    found = list(results(chosen, packages, asked.limit))
    counts = Counter(outcome.word for outcome in found)
    behind = sum(outcome.word == "refused" and outcome.torch.startswith("takes it") for outcome in found)
    words = ", ".join(f"{counts[word]} {word}" for word in ("right", "refused", *FAILED, "absent"))
    of = len({entry.package for entry in chosen})
    print(
        f"{len(found)} modules of {of} packages: {words}; refused though torch.onnx.export takes it: {behind}"
    )
    return int(behind > 0 or any(counts[word] for word in FAILED))


if __name__ == "__main__":
    sys.exit(main())
