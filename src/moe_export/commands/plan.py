"""`moe-export plan model.py`: what splitting its experts over ranks costs, without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from moe_export.commands.console import Console
from moe_export.commands.sizes import parse_bytes


def add_plan_command(
    group: click.Group, model_options: Callable[..., Any], output_options: Callable[..., Any]
) -> None:
    """Put the command into the command line."""

    @group.command("plan")
    @click.argument("model", metavar="MODEL.PY[:CLASS]")
    @click.option("--memory", default="80GB", show_default=True, metavar="SIZE", help="Of one device.")
    @click.option(
        "--gpus", type=click.IntRange(1, 65536), default=8, show_default=True, help="Devices at most."
    )
    @model_options
    @output_options
    def plan_command(**options: Any) -> int:
        """Calculate what each way of splitting the experts over ranks costs, without the model's weights.

        Bytes of weights a rank, bytes of values for a batch, bytes exchanged a token, the largest batch that fits;
        for 1, 2, 4, ... ranks up to --gpus. Exit code 0 if the model fits one way or another, 1 if it does not.
        """
        return run_plan(**options)


def run_plan(
    model: str,
    memory: str,
    gpus: int,
    init: tuple[str, ...],
    inputs: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> int:
    """Run the command; the exit code."""
    from moe_export.large.planning import lines, plan
    from moe_export.large.planning_count import count
    from moe_export.large.planning_model import load_weightless, trace_weightless

    console = Console(quiet, as_json)
    size = parse_bytes(memory, "--memory")
    with console.user_code():
        with console.step(f"loading {model}"):
            found = load_weightless(model, init, inputs)
        with console.step("tracing"):
            counted = count(trace_weightless(found))
    made = plan(counted, size, gpus)
    notes = [f"note: {note}" for note in counted.refused]
    if found.made:
        notes.append("note: the file needs values while it runs, so its weights were made, and let go of")
    for line in [*lines(made), *notes]:
        console.say(line)
    document = {
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
        "splits": [split.to_dict() for split in made.splits],
        "notes": notes,
    }  # fmt: skip
    console.json(json.dumps(document, indent=2))
    return 0 if made.fits_from is not None else 1
