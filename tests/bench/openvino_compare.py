"""OpenVINO beside onnxruntime, on one thread: writes the table of docs/openvino.md.

    graph   sizes   onnxruntime ms   openvino ms   largest difference

Each file of models/ is exported for either engine (`--target`), and experts of a real size in the forms that either
takes. All runs at one size are made in one order drawn anew each round; figures are medians. With `--page` the table
is written between the two marks of the page.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from test_experts_bench import Block, H

from moe_export.export import Options, export_subject, load_subject
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.verify import TensorSpec
from moe_export.verify.runners.openvino_runner import OpenVinoRunner

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "openvino.md"
MARKS = ("<!-- measured -->\n", "<!-- /measured -->")
MODELS = ("attention", "gshard_moe", "hybrid", "mamba", "mamba2", "moe_gate", "sparse_moe")
LENGTHS = (64, 512)
ROUNDS = 21

Run = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One graph at one size: the medians in ms by engine, and the largest difference of an output."""

    graph: str
    sizes: str
    milliseconds: Mapping[str, float]
    difference: float

    def __str__(self) -> str:
        times = " | ".join(f"{value:.2f}" for value in self.milliseconds.values())
        return f"| {self.graph} | {self.sizes} | {times} | {self.difference:.0e} |"


def main() -> int:
    """Measure everything, print the table, write the page if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--page", action="store_true", help="write the table into docs/openvino.md")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose graph has one of these in its name")
    asked = parser.parse_args()
    if asked.page and asked.only:
        parser.error("the page holds all rows: leave out --only")
    torch.set_num_threads(1)
    lines = ["| graph | sizes | onnxruntime ms | openvino ms | largest difference |", "|---|---|---|---|---|"]
    print(*lines, sep="\n")
    for row in rows(asked.only):
        lines.append(str(row))
        print(row, flush=True)
    if asked.page:
        write_page(lines)
    return 0


def rows(only: list[str]) -> Iterator[Row]:
    """Every graph at every size."""
    with TemporaryDirectory(prefix="moe-export-") as folder:
        for name in MODELS:
            if wanted(f"models/{name}.py", only):
                subject = load_subject(str(ROOT / "models" / f"{name}.py"))
                engines, specs = opened(subject, Path(folder))
                for length in LENGTHS:
                    inputs = at_length(subject, specs, length)
                    yield measured(f"models/{name}.py", f"1 x {length}", engines, inputs)
        for experts, k in ((8, 2), (64, 8)):
            name = f"{experts} experts, {k} a token, 256 to 512"
            if wanted(name, only):
                subject = make_subject(
                    Block(experts, k), (torch.randn(32, H),), {}, source=Path(__file__), how=""
                )
                engines, _ = opened(subject, Path(folder))
                for count in (1, 16, 256):
                    x = np.random.default_rng(0).standard_normal((count, H)).astype(np.float32)
                    yield measured(name, f"{count} tokens", engines, {"x": x})


def wanted(name: str, only: list[str]) -> bool:
    return not only or any(each in name for each in only)


def opened(subject: Subject, folder: Path) -> tuple[dict[str, Run], Sequence[TensorSpec]]:
    """The subject's graph in each engine, written for it, on one thread; and its inputs."""
    paths = {}
    for target in ("onnxruntime-cpu", "openvino"):
        graph = export_subject(subject, Options(gates=False, target=target))[0]
        paths[target] = folder / f"{target}.onnx"
        write_model(graph.model, paths[target])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        paths["onnxruntime-cpu"], options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    kept = [value.name for value in session.get_inputs()]

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: inputs[name] for name in kept}
        return dict(zip(names, session.run(names, given), strict=True))

    other = OpenVinoRunner(paths["openvino"], threads=1)
    return {"onnxruntime": run, "openvino": other.run}, other.inputs


def at_length(subject: Subject, specs: Sequence[TensorSpec], length: int) -> dict[str, Any]:
    """One row of this length, by the graph's names of its axes; integers up to the example's largest."""
    generator = np.random.default_rng(0)
    found = {}
    for spec in specs:
        shape = [size if isinstance(size, int) else 1 if size == "batch" else length for size in spec.shape]
        if spec.dtype == "float32":
            found[spec.name] = generator.standard_normal(shape).astype(np.float32)
        elif spec.dtype == "bool":
            found[spec.name] = np.tril(np.ones(shape, bool))
        else:
            most = int(subject.inputs[spec.name].max())
            found[spec.name] = generator.integers(0, most + 1, shape).astype(spec.dtype)
    return found


def measured(name: str, sizes: str, engines: Mapping[str, Run], inputs: Mapping[str, Any]) -> Row:
    """One row; experts of a gate are compared as sets."""
    found = [engine(inputs) for engine in engines.values()]
    difference = max(
        float(np.abs(np.sort(mine) - np.sort(np.atleast_1d(found[1][output]))).max())
        for output, mine in ((name, np.atleast_1d(value).astype(float)) for name, value in found[0].items())
    )
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in range(ROUNDS):
        for engine in random.sample(list(engines), len(engines)):
            start = time.perf_counter()
            engines[engine](inputs)
            times[engine].append(1000 * (time.perf_counter() - start))
    return Row(name, sizes, {engine: statistics.median(each) for engine, each in times.items()}, difference)


def write_page(lines: list[str]) -> None:
    """Put the table between the two marks of the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(before + MARKS[0] + "\n".join(lines) + "\n" + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
