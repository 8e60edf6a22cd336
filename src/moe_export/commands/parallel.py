"""`--expert-parallel N`: the graphs of N ranks beside the whole model's, their manifest, and whether they agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.commands.console import Console
from moe_export.errors import UsageError
from moe_export.options.making import RANKS
from moe_export.options.table import names_in
from moe_export.own_files import KEY

if TYPE_CHECKING:
    from moe_export.commands.export_document import RanksEntry
    from moe_export.export.gates.dispatch import Dispatch
    from moe_export.export.options import Options
    from moe_export.export.parallel.manifest import ManifestDocument
    from moe_export.export.parallel.ranks import Parallel
    from moe_export.export.pipeline import Graph
    from moe_export.verify import Report, Tolerance

_DYNAMIC = "dynamic"


def take_parallel(options: dict[str, Any]) -> Parallel | None:
    """Take these options out of a command's; None where no ranks were asked for.

    Raises:
        UsageError: An option goes with another way to exchange.
    """
    from moe_export.export.parallel.ranks import Parallel, check_parallel

    given = {name: options.pop(name) for name in names_in(RANKS)}
    if given["expert_parallel"] is None:
        return None
    if options["dtype"] != "float32":
        raise UsageError(
            "--expert-parallel writes float32 graphs only: in half precision a token whose scores are nearly equal may"
            " go to another expert on ranks than in the whole graph, which their comparison takes for a fault",
            hint=f"leave --dtype {options['dtype']} away",
        )
    text, capacity = given["exchange_rows"], None
    if text != _DYNAMIC:
        if not text.isdigit() or not int(text):
            raise UsageError(
                f"--exchange-rows is a number of rows, or {_DYNAMIC}, not {text!r}", hint="--exchange-rows 64"
            )
        capacity = int(text)
    parallel = Parallel(
        given["expert_parallel"], given["exchange"], capacity, given["placement"], given["collectives"]
    )
    check_parallel(parallel)
    return parallel


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        document: For the report.
        lines: For people.
        report: Whether the ranks agree with the whole model; None where they were not run.
    """

    document: RanksEntry
    lines: tuple[str, ...]
    report: Report | None


def write_ranks(
    graph: Graph,
    options: Options,
    parallel: Parallel,
    folder: Path,
    whole: str,
    console: Console,
    tolerance: Tolerance | None,
    seed: int,
) -> Written:
    """Write the graphs of all ranks and their manifest into a folder, and run them side by side.

    Args:
        graph: The whole model's.
        options: What it was made with.
        parallel: How to split it.
        folder: It holds the whole model's graph.
        whole: The name of that.
        console: Shows progress.
        tolerance: For the comparison with the whole; None for no comparison.
        seed: Of its inputs.
    """
    import moe_export
    from moe_export.export.onnx.serialize import write_model
    from moe_export.export.onnx.simplify import as_numpy
    from moe_export.export.parallel.manifest import Facts, file_name, manifest
    from moe_export.export.parallel.ranks import rank_graphs

    stem = graph.reference.source.stem
    with console.step(f"writing the graphs of {parallel.ranks} ranks"):
        ranks = rank_graphs(graph, options, parallel)
        example = f"{stem}.parallel.safetensors"
        _save({name: as_numpy(value) for name, value in graph.traced.example.items()}, folder / example)
        facts: Facts = {"version": moe_export.__version__, "opset": options.opset, "target": options.target}
        document = manifest(graph, ranks, whole, example, facts)
        for rank, staged in enumerate(ranks.staged):
            for stage, model in enumerate(staged.stages):
                model.producer_name, model.producer_version = "moe-export", moe_export.__version__
                write_model(model, folder / file_name(stem, rank, stage))
    name = f"{stem}.parallel.json"
    (folder / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    report = None
    if tolerance is not None:
        with console.step(f"verifying {parallel.ranks} ranks"):
            report = _verified(folder / name, tolerance, seed)
        if report.exit_code:  # nobody deploys it
            name = f"{stem}.parallel.rejected.json"
            (folder / f"{stem}.parallel.json").rename(folder / name)
    found: RanksEntry = {
        "manifest": name,
        "ranks": parallel.ranks,
        "exchange": parallel.exchange,
        "bytes": [one["bytes"] for one in document["graphs"]],
        "notes": list(ranks.notes),
        "verification": report.to_dict() if report else None,
    }
    return Written(found, tuple(_lines(document, ranks.notes, report)), report)


def _save(arrays: dict[str, Any], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(arrays, path, {f"{KEY}example": path.name})


def _verified(path: Path, tolerance: Tolerance, seed: int) -> Report:
    """All ranks in this process, against the whole model's graph."""
    from moe_export.verify import OnnxRuntimeRunner, compare
    from moe_export.verify.parallel.in_graph import open_rank
    from moe_export.verify.parallel.manifest import read_manifest
    from moe_export.verify.parallel.rank import Together
    from moe_export.verify.parallel.run import all_cases
    from moe_export.verify.parallel.slices import Joined, Sliced, Slices
    from moe_export.verify.runner import Runner

    found = read_manifest(path)
    assert found.whole is not None
    reference: Runner = OnnxRuntimeRunner(found.whole)
    together = Together([open_rank(found, rank) for rank in range(found.ranks)])
    candidate: Runner = together
    if found.exchange == "all_to_all":
        slices = Slices(found.ranks, found.inputs, found.outputs)
        reference, candidate = Sliced(reference, slices), Joined(together.name, together.run_each, slices)
    return compare(reference, candidate, all_cases(found, seed), tolerance=tolerance)


def _lines(document: ManifestDocument, notes: tuple[str, ...], report: Report | None) -> list[str]:
    lines = [f"{document['ranks']} ranks, {document['exchange']}:"]
    for one in document["graphs"]:
        experts = "; ".join(_numbers(numbers) for numbers in one["experts"])
        size = f"{one['bytes'] / 2**20:.2f} MiB, {one['expert_bytes'] / 2**20:.2f} of experts"
        lines.append(f"  rank {one['rank']}: experts {experts} ({size})")
    for exchange in document["exchanges"]:
        row = sum(value["bytes_per_row"] for value in exchange["values"])
        back = " back" if exchange["back"] else ""
        what = "a token" if exchange["kind"] == "all_reduce" else "a row sent"
        lines.append(f"  layer {exchange['layer']}: {exchange['kind']}{back}, {row} bytes {what}")
    lines += [f"  note: {note}" for note in notes]
    if report is not None:
        lines.append(f"  run side by side in one process, {len(report.compared)} cases: {report.verdict}")
    return lines


def _numbers(numbers: list[int]) -> str:
    """`0-3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"


def draw_ranks(dispatches: Sequence[Dispatch], manifest: str, batch: int) -> tuple[str, list[str]]:
    """A picture of the ranks on a real batch, and the same as text.

    Args:
        dispatches: Where every gate of the model sent every token.
        manifest: The file that says which rank has which expert; or its folder.
        batch: Rows of the batch.

    Raises:
        UsageError: The manifest cannot be read, or is another model's.
    """
    from moe_export.export.parallel.picture import draw, flow, lines
    from moe_export.verify.parallel.manifest import find_manifest, read_manifest

    found = read_manifest(find_manifest(manifest))
    flows, left = [], list(dispatches)
    for number, layer in enumerate(found.layers):
        fits = [one for one in left if (one.experts, one.indices.shape[1]) == (layer.experts, layer.slots)]
        if not fits:
            raise UsageError(
                f"no gate of this model chooses {layer.slots} of {layer.experts} experts, as layer {number} of the"
                " manifest says",
                where=str(found.path),
                hint="give the manifest of this model",
            )
        left = left[left.index(fits[0]) + 1 :]
        both = [sum(one.row_bytes) for one in found.exchanges if one.layer == number]
        row_bytes = (both[0], both[1] if len(both) > 1 else 0)
        about = (layer.module, found.exchange, layer.placement, found.ranks)
        flows.append(flow(about, fits[0].indices, batch, row_bytes))
    return draw(flows), lines(flows)
