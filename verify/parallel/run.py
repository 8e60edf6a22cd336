"""Run the graphs of all ranks, one process each, and compare them with the whole model.

    torchrun --nproc-per-node 4 -m moe_export.verify.parallel out/

Rank 0 makes the cases, runs the whole model's graph beside the ranks, and reports; the others run what it says. Exit
codes as everywhere: 0 equal, 1 not equal or a rank was lost, 2 wrong use, 4 a backend is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, takewhile
from pathlib import Path

from moe_export.errors import MoeExportError, UsageError
from moe_export.own_files import put_text
from moe_export.verify.compare import compare
from moe_export.verify.golden import read_inputs
from moe_export.verify.inputs.cases import Case, cases
from moe_export.verify.inputs.experts_alone import repeated
from moe_export.verify.judging.tolerance import Tolerance
from moe_export.verify.parallel.group import Group, LostError
from moe_export.verify.parallel.in_graph import open_rank
from moe_export.verify.parallel.manifest import Manifest, find_manifest, read_manifest
from moe_export.verify.parallel.rank import Rank, Sent, check_same
from moe_export.verify.parallel.slices import Joined, Sliced, Slices
from moe_export.verify.parallel.watch import LEAVING
from moe_export.verify.reports.table import show
from moe_export.verify.runner import Runner
from moe_export.verify.runners.onnxruntime_runner import OnnxRuntimeRunner
from moe_export.verify.specs import Array

TRAFFIC = "moe-export/traffic/1"
_BACKENDS = ("onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt")
_TOKENS = 8  # tokens of the example of which each is tried alone


class Conductor:
    """Rank 0: broadcasts what to run, and collects the results.

    Args:
        group: The processes.
        rank: The graphs of rank 0.

    Attributes:
        sent: Of each run, what every rank gave.
        lost: Why there are no more ranks to run, once there are not.
    """

    def __init__(self, group: Group, rank: Rank) -> None:
        self._group = group
        self._rank = rank
        self.name = f"{group.name}, {rank.name}"
        self.sent: list[tuple[Sent, ...]] = []
        self.lost: MoeExportError | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run every rank on the same inputs; the outputs, which must be every rank's."""
        found = self.run_each([inputs] * self._group.ranks)
        check_same(found)
        return found[0]

    def run_each(self, inputs: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Run each rank on inputs of its own."""
        try:
            self._group.broadcast([dict(one) for one in inputs])
            found = self._group.gather(_run(self._group, self._rank, inputs[0]))
        except LostError as error:
            self.lost = error
            raise
        self.sent.append(tuple(sent for _, given in found for sent in given))
        return [outputs for outputs, _ in found]


def _run(group: Group, rank: Rank, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[Sent, ...]]:
    outputs = group.run(rank, inputs)
    return outputs, tuple(rank.sent)


def follow(group: Group, rank: Rank) -> int:
    """Every other rank: run what rank 0 broadcasts, until that is an exit code."""
    while True:
        received = group.broadcast()
        if isinstance(received, int):
            return received
        group.gather(_run(group, rank, received[group.rank]))


def conduct(group: Group, manifest: Manifest, rank: Rank, options: argparse.Namespace) -> int:
    """Rank 0: compare, report, and broadcast the exit code."""
    path = Path(options.against) if options.against else manifest.whole
    if path is None:
        raise UsageError("the manifest names no graph of the whole model", hint="--against model.onnx")
    reference: Runner = OnnxRuntimeRunner(path, _provider(options))
    conductor = Conductor(group, rank)
    if not options.quiet:
        print(f"{conductor.name}: all are here", flush=True)
    candidate: Runner = conductor
    if manifest.exchange == "all_to_all":
        slices = Slices(manifest.ranks, manifest.inputs, manifest.outputs)
        reference = Sliced(reference, slices)
        candidate = Joined(conductor.name, conductor.run_each, slices)
    report = compare(
        reference,
        candidate,
        takewhile(lambda _: conductor.lost is None, _repeated(manifest, options)),
        tolerance=Tolerance(options.rtol, options.atol),
        about={"candidate": str(manifest.path), "reference": str(path)},
    )
    if conductor.lost is not None:
        raise conductor.lost
    if options.output:
        put_text(Path(options.output), report.to_json(), inputs=(manifest.path, path), force=options.force)
    if options.traffic:
        runs = [[asdict(sent) | {"bytes": sent.bytes} for sent in run] for run in conductor.sent]
        text = json.dumps({"schema": TRAFFIC, "runs": runs}) + "\n"
        put_text(Path(options.traffic), text, inputs=(manifest.path, path), force=options.force)
    if not options.quiet:
        show(report, sys.stdout)
        for line in exchanged(conductor.sent):
            print(line)
    group.broadcast(report.exit_code)
    return report.exit_code


def _repeated(manifest: Manifest, options: argparse.Namespace) -> Iterator[Case]:
    for number in range(options.repeat):
        yield from all_cases(manifest, options.seed + number, options.thorough, options.inputs)


def all_cases(
    manifest: Manifest, seed: int = 0, thorough: bool = False, files: Sequence[str] = ()
) -> Iterator[Case]:
    """The cases of a comparison: the usual ones, the user's own, and of the example's tokens some alone.

    Args:
        manifest: Names the example.
        seed: Of the values.
        thorough: Every kind of values.
        files: Of the user's own inputs.

    Raises:
        UsageError: There is no example, or a file does not fit.
    """
    names = [spec.name for spec in manifest.inputs]
    if manifest.example is None:
        raise UsageError("the manifest names no example inputs", where=str(manifest.path))
    example = read_inputs(manifest.example, names)
    own = [read_inputs(Path(file), names) for file in files]
    usual = cases(manifest.inputs, manifest.dims, example, seed, thorough=thorough)
    first = next(usual)
    given = [
        Case(Path(file).name, seed, _sizes(manifest, arrays), arrays)
        for file, arrays in zip(files, own, strict=True)
    ]
    return chain([first], given, _alone(first), usual)


def _sizes(manifest: Manifest, arrays: Mapping[str, Array]) -> dict[str, int]:
    return {
        size: int(got)
        for spec in manifest.inputs
        for size, got in zip(spec.shape, arrays[spec.name].shape, strict=False)
        if isinstance(size, str) and size.isidentifier()
    }


def _alone(case: Case) -> Iterator[Case]:
    """One token throughout, for some tokens of the example: every row goes to the same experts."""
    name, array = max(case.inputs.items(), key=lambda item: item[1].size)
    if array.ndim < 2:
        return
    rows = array.reshape(-1, array.shape[-1]) if array.dtype.kind not in "iu" else array.reshape(-1)
    for row in range(min(_TOKENS, len(rows))):
        inputs = {**case.inputs, name: repeated(array, row)}
        yield Case(f"token {row} throughout", case.seed, case.sizes, inputs)


def exchanged(runs: Sequence[Sequence[Sent]]) -> list[str]:
    """One line for each exchange: what the ranks sent, over all runs."""
    kinds: dict[tuple[int, str, bool, int], list[Sent]] = {}
    for sent in chain.from_iterable(runs):
        kinds.setdefault((sent.layer, sent.kind, sent.back, sent.row_bytes), []).append(sent)
    lines = []
    for (layer, kind, back, size), found in kinds.items():
        rows = sum(sum(sent.rows) if kind == "all_reduce" else _to_others(sent) for sent in found)
        what = f"layer {layer}, {kind}{' back' if back else ''}"
        total = sum(sent.bytes for sent in found)
        lines.append(f"{what}: all ranks gave {rows} rows of {size} bytes, {total} bytes in {len(runs)} runs")
    return lines


def _to_others(sent: Sent) -> int:
    return sum(sent.rows) - sent.rows[sent.rank]


def _provider(options: argparse.Namespace) -> str:
    """Where onnxruntime runs."""
    return str(options.backend).removeprefix("onnxruntime-")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m moe_export.verify.parallel",
        description="Run the graphs of all ranks, a process a rank, and compare them with the whole model.",
        epilog="Started by torchrun: torchrun --nproc-per-node 4 -m moe_export.verify.parallel out/",
    )
    made.add_argument("folder", help="of the ranks' graphs, or their MODEL.parallel.json")
    made.add_argument("--against", metavar="MODEL.ONNX", help="the whole model's graph [the manifest's]")
    made.add_argument("--transport", choices=["gloo", "nccl"], default="gloo", help="what carries exchanges")
    made.add_argument("--backend", choices=_BACKENDS, default=_BACKENDS[0], help="what runs the graphs")
    made.add_argument("--timeout", type=float, default=8.0, help="seconds that one exchange may take [8]")
    made.add_argument("--join", type=float, default=60.0, help="seconds to wait for all ranks to come [60]")
    made.add_argument(
        "--input-file", dest="inputs", action="append", default=[], metavar="FILE", help="your own inputs"
    )
    made.add_argument("--seed", type=int, default=0, help="of the inputs")
    made.add_argument("--repeat", type=int, default=1, metavar="N", help="all cases under N seeds")
    made.add_argument("--thorough", action="store_true", help="every kind of values, at more sizes")
    made.add_argument("--rtol", type=float, help="relative tolerance [float32: 1e-5]")
    made.add_argument("--atol", type=float, help="absolute tolerance [float32: 1e-5]")
    made.add_argument("-o", "--output", metavar="FILE.json", help="write the report")
    made.add_argument("--traffic", metavar="FILE", help="write what every rank gave, run by run, as JSON")
    made.add_argument(
        "--force", action="store_true", help="overwrite files that moe-export did not write, and inputs"
    )
    made.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    options = parser().parse_args(arguments)
    group: Group | None = None
    try:
        manifest = read_manifest(find_manifest(options.folder))
        group = Group(manifest.ranks, options.transport, options.timeout, options.join)
        rank = open_rank(manifest, group.rank, _provider(options))
        code = conduct(group, manifest, rank, options) if group.rank == 0 else follow(group, rank)
        group.end()
        return code
    except MoeExportError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if group is not None:  # the others learn it from closed connections; a polite end would wait for them
            sys.stdout.flush()
            time.sleep(LEAVING)
            os._exit(error.exit_code)
        return error.exit_code
