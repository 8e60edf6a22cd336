"""moe-export beside `torch.onnx.export`: `make compare`, or `python tests/bench/exporters.py`.

Each module of `exporters.toml` becomes a model file. Both exporters take it in processes of their own, with the same
opset and the same free axes. Each graph is compared with PyTorch at the example's sizes and at three others, by one
piece of code that belongs to neither. An exporter that refuses the axes, or writes a wrong graph, is asked again for
what it keeps free by itself, and for none; the first graph that is not wrong counts.

One line is printed for each module and exporter; everything goes into `build/exporters/results.json`, and with `--page`
the table into docs/exporters.md. The exit code is 1 if a graph of moe-export is wrong, or if it refuses what PyTorch
takes.

    right    with all axes free
    fixed    refused with these free; right at the sizes that are left
    wrong    at a size that the graph takes
    refused  in every way

Seconds are those of CPU time of the whole process: imports, export, writing. Other work on the machine changes them by
some tens of percent, and ratios less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "exporters.md"
START, END = "<!-- made by `make compare` -->", "<!-- end -->"
ATTEMPTS = {"torch": ("named", "auto", "none"), "moe-export": ("named", "none")}
"""How an exporter is asked, one after the other until it gives a graph; see `exporters_apart.dynamic_shapes`."""
OTHER_SIZES = ((1, 1), (3, 17), (2, 130))
"""The first axis, the batch, and all others. One token; an odd length; a length far above the example's."""
LIMIT = 600.0
"""Seconds for one process."""


@dataclass(frozen=True)
class Entry:
    """One module to export.

    Attributes:
        name: Its row in the table.
        kind: What the table groups it under.
        code: The model file: `model`, `example_inputs`.
        free: For each input the name of each free axis, "" for one that stays.
        sizes: The other sizes to compare at.
    """

    name: str
    kind: str
    code: str
    free: Mapping[str, Sequence[str]]
    sizes: Sequence[Mapping[str, int]]

    @property
    def axes(self) -> list[str]:
        """The names of the free axes."""
        return list(dict.fromkeys(name for axes in self.free.values() for name in axes if name))


@dataclass(frozen=True)
class Outcome:
    """What came of one exporter.

    Attributes:
        word: `right`, `fixed`, `wrong` or `refused`.
        text: What there is to say.
        nodes: Of the graph, its subgraphs and functions.
        cpu: CPU seconds of the process that gave the graph.
        wall: Seconds of the export alone.
        verified: CPU seconds of the process with moe-export's own verification.
        attempts: The texts of this and of former attempts.
    """

    word: str
    text: str
    nodes: int = 0
    cpu: float = 0.0
    wall: float = 0.0
    verified: float = 0.0
    attempts: Mapping[str, str] = field(default_factory=dict)

    @property
    def cell(self) -> str:
        """What the table says: where axes are fixed, also how the first attempt was refused."""
        first = next(iter(self.attempts.values()), self.text)
        return self.text if first == self.text else f"{self.text}; with free ones {first}"


def read() -> list[Entry]:
    """The modules of `exporters.toml`."""
    entries = []
    for each in tomllib.loads((HERE / "exporters.toml").read_text())["module"]:
        parts = [(ROOT / each["file"]).read_text()] if "file" in each else []
        free = each["free"]
        names = list(dict.fromkeys(name for axes in free.values() for name in axes if name))
        usual = [{name: batch if name == "batch" else size for name in names} for batch, size in OTHER_SIZES]
        code = "\n".join([*parts, each.get("code", "").lstrip()])
        entries.append(Entry(each["name"], each["kind"], code, free, each.get("sizes", usual)))
    return entries


def run(entry: Entry, who: str, build: Path) -> Outcome:
    """The first graph of one exporter that is not wrong, or else what the first attempt came to."""
    found = []
    for attempt in ATTEMPTS[who]:
        found.append(once(entry, who, attempt, build))
        if found[-1].word in ("right", "fixed"):
            break
    said = {attempt: each.text for attempt, each in zip(ATTEMPTS[who], found, strict=False)}
    best = next((each for each in found if each.word in ("right", "fixed")), None)
    best = best or next((each for each in found if each.word == "wrong"), found[0])
    return replace(best, attempts=said)


def once(entry: Entry, who: str, attempt: str, build: Path) -> Outcome:
    """Export, and compare what comes of it."""
    place = build / "".join(letter if letter.isalnum() else "-" for letter in entry.name)
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.py").write_text(entry.code)
    given = ("model.py", f"{who}.{attempt}.onnx", "--free", json.dumps(entry.free))
    done = apart(place, "exporters_apart.py", who, *given, "--attempt", attempt)
    if "error" in done:
        return Outcome("refused", f"refused: {done['error']}")
    found = apart(place, "exporters_compare.py", *given, "--cases", json.dumps(entry.sizes))
    word, text = judged(found, entry.axes)
    if done.get("verdict", "equal") != "equal":
        word, text = "wrong", f"its own verdict is {done['verdict']!r}; {text}"
    return Outcome(word, text, found.get("nodes", 0), done["cpu"], done["wall"], done.get("verified", 0.0))


def apart(place: Path, script: str, *arguments: str) -> dict[str, Any]:
    """What a script beside this one prints last, or the error that it ends in."""
    paths = (ROOT / "tests" / "written", ROOT / "tests" / "families")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), *arguments]
    try:
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {LIMIT:.0f} s"}
    with (place / "log.txt").open("a") as log:
        log.write(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {"error": f"exit code {done.returncode}: {lines[-1] if lines else ''}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judged(found: Mapping[str, Any], names: Collection[str]) -> tuple[str, str]:
    """The word for a comparison, and what there is to say.

    Args:
        found: What `exporters_compare.py` prints.
        names: The free axes.
    """
    if "error" in found:
        return "wrong", f"the comparison failed: {found['error']}"
    tried = "1 size" if found["tried"] == 1 else f"{found['tried']} sizes"
    if found["wrong"]:
        sizes, text = found["wrong"][0]
        said = f"wrong at {len(found['wrong'])} of {tried}: {sizes}: {text}"
    elif names and set(found["fixed"]) == set(names):
        said = "right at the example's sizes only"
    else:
        said = f"right at {tried}" + (f", {', '.join(found['fixed'])} fixed" if found["fixed"] else "")
    parts = [said]
    parts += [f"does not claim {'; '.join(found['unclaimed'])}"] if found["unclaimed"] else []
    parts += [f"the module refuses {'; '.join(found['refused'])}"] if found["refused"] else []
    parts += [f"onnx.checker refuses it: {found['invalid']}"] if found["invalid"] else []
    less = found["fixed"] or found["unclaimed"]
    return "wrong" if found["wrong"] else "fixed" if less else "right", "; ".join(parts)


def table(rows: Sequence[tuple[Entry, Mapping[str, Outcome]]]) -> str:
    """The rows as a Markdown table, a heading line for each kind."""
    lines = [
        "| module | `torch.onnx.export` | `moe-export` | nodes | CPU s | verified |",
        "|---|---|---|---|---|---|",
    ]
    kind = ""
    for entry, found in rows:
        if entry.kind != kind:
            kind = entry.kind
            lines.append(f"| **{kind}** | | | | | |")
        torchs, ours = found["torch"], found["moe-export"]
        nodes = " / ".join(str(each.nodes) if each.nodes else "–" for each in (torchs, ours))
        cpu = " / ".join(f"{each.cpu:.0f}" if each.nodes else "–" for each in (torchs, ours))
        cells = [entry.name, in_a_cell(torchs.cell), in_a_cell(ours.cell), nodes, cpu, f"{ours.verified:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_a_cell(text: str) -> str:
    """A text cut to what a cell holds, without what Markdown would read as its own."""
    short = text if len(text) <= 110 else f"{text[:107]}..."
    return short.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def summary(rows: Sequence[tuple[Entry, Mapping[str, Outcome]]]) -> str:
    """How many modules each exporter gets right, a line for each."""
    lines = []
    for who, name in (("torch", "`torch.onnx.export`"), ("moe-export", "`moe-export`")):
        words = [found[who].word for _, found in rows]
        counts = ", ".join(
            f"{words.count(word)} {said}"
            for word, said in (
                ("right", "right at all sizes"),
                ("fixed", "right with axes fixed"),
                ("wrong", "wrong"),
                ("refused", "refused"),
            )
        )
        lines.append(f"{name}, of {len(rows)} modules: {counts}.")
    return "\n".join(lines)


def versions() -> str:
    """What was measured, and on what."""
    names = ("torch", "onnxscript", "onnxruntime-gpu", "onnxruntime", "transformers")
    known = {name: found for name in names if (found := installed(name))}
    shown = ", ".join(f"{name} {found}" for name, found in known.items())
    return f"Python {platform.python_version()}, {shown}; {platform.machine()}, one thread a process."


def installed(name: str) -> str:
    """The version of a distribution; empty if there is none."""
    try:
        return version(name)
    except ImportError:
        return ""


def write_page(rows: Sequence[tuple[Entry, Mapping[str, Outcome]]]) -> None:
    """Put what was measured between the two marks of the page."""
    before, rest = PAGE.read_text().split(START)
    after = rest.split(END)[1]
    PAGE.write_text(
        f"{before}{START}\n{summary(rows)}\n\n{table(rows)}\n\nMeasured with {versions()}\n{END}{after}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the modules; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="modules whose name holds one of these"
    )
    parser.add_argument("--page", action="store_true", help="write the table into docs/exporters.md")
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build" / "exporters", help="where models and graphs go"
    )
    parser.add_argument("--jobs", type=int, default=1, help="modules at a time")
    asked = parser.parse_args(arguments)
    chosen = [entry for entry in read() if not asked.only or any(part in entry.name for part in asked.only)]
    if not chosen:
        parser.error(f"no module is called {' or '.join(asked.only)}")
    if asked.page and asked.only:
        parser.error("the page holds all modules: leave out --only")
    shutil.rmtree(asked.build, ignore_errors=True)
    with ThreadPoolExecutor(asked.jobs) as pool:
        rows = list(zip(chosen, pool.map(lambda entry: measured(entry, asked.build), chosen), strict=True))
    results = {entry.name: {who: asdict(outcome) for who, outcome in found.items()} for entry, found in rows}
    (asked.build / "results.json").write_text(
        json.dumps({"versions": versions(), "modules": results}, indent=1)
    )
    print(f"\n{table(rows)}\n\n{summary(rows)}\n{versions()}")
    if asked.page:
        write_page(rows)
    return int(any(is_failure(found) for _, found in rows))


def measured(entry: Entry, build: Path) -> dict[str, Outcome]:
    """What comes of a module, by exporter, printed as it comes."""
    found = {}
    for who in ATTEMPTS:
        outcome = found[who] = run(entry, who, build)
        print(
            f"{entry.name}: {who}: {outcome.cell} ({outcome.nodes} nodes, {outcome.cpu:.1f} CPU s)",
            flush=True,
        )
    return found


def is_failure(found: Mapping[str, Outcome]) -> bool:
    """Whether moe-export is wrong, or refuses what PyTorch's exporter takes."""
    ours, torchs = found["moe-export"].word, found["torch"].word
    return ours == "wrong" or (ours == "refused" and torchs in ("right", "fixed"))


if __name__ == "__main__":
    sys.exit(main())
