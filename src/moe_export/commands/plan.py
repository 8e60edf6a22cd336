"""`moe-export plan model.py`: what splitting its experts over ranks costs, without its weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypedDict

from moe_export.commands.console import Console
from moe_export.export.quantize.scheme import Packing, Scheme
from moe_export.large.planning import Split, lines, plan
from moe_export.options.memory import parse_bytes


class LayerEntry(TypedDict):
    """A block of experts: its bytes in each of its experts, FLOPs, and bytes that go there and back."""

    module: str
    experts: int
    slots: int
    bytes: list[int]
    flops: float
    partial: float
    there: float
    back: float


class PlanDocument(TypedDict):
    """What each way of splitting the experts over ranks costs: `moe-export plan --json`."""

    schema: Literal["moe-export/plan/1"]
    model: str
    parameters: int
    bytes: int
    dense_bytes: int
    layers: list[LayerEntry]
    sizes: dict[str, int]
    memory: int
    fits_from: int | None
    splits: Annotated[list[dict[str, Any]], list[Split]]
    notes: list[str]


def run_plan(
    model: str,
    gpu_memory: str,
    gpus: int,
    init: tuple[str, ...],
    inputs: tuple[str, ...],
    weights_dtype: Literal["float32"] | Packing,
    block_size: str | None,
    *,
    zero_points: bool,
    console: Console,
) -> int:
    """Run the command; the exit code."""
    from moe_export.large.planning_count import count
    from moe_export.large.planning_model import load_weightless, trace_weightless

    size = parse_bytes(gpu_memory, "--gpu-memory")
    scheme = None
    if weights_dtype != "float32":
        block = None if block_size is None else int(block_size)
        scheme = Scheme.of(weights_dtype, block, zero_points=zero_points)
    with console.user_code():
        with console.step(f"loading {model}"):
            found = load_weightless(model, init, inputs)
        with console.step("tracing"):
            counted = count(trace_weightless(found), scheme)
    made = plan(counted, size, gpus)
    notes = [f"note: {note}" for note in counted.refused]
    if scheme is not None:
        notes.append(f"note: with weights of experts in {scheme}")
    if found.made:
        notes.append("note: the file needs values while it runs, so its weights were made, and let go of")
    for line in [*lines(made), *notes]:
        console.say(line)
    document: PlanDocument = {
        "schema": "moe-export/plan/1",
        "model": found.source.name,
        "parameters": counted.parameters,
        "bytes": counted.bytes,
        "dense_bytes": counted.dense_bytes,
        "layers": [
            {"module": block.module, "experts": block.experts, "slots": block.slots, "bytes": list(block.bytes_each),
             "flops": block.flops, "partial": block.partial, "there": block.there, "back": block.back}
            for block in counted.blocks
        ],
        "sizes": {counted.names[name]: size for name, size in counted.dims.items()},
        "memory": size,
        "fits_from": made.fits_from,
        "splits": [asdict(split) for split in made.splits],
        "notes": notes,
    }  # fmt: skip
    console.json(json.dumps(document, indent=2))
    return 0 if made.fits_from is not None else 1
