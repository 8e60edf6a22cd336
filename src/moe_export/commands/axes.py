"""`moe-export axes model.py`: each line of a model with what the axes of its values run over."""

from __future__ import annotations

import json

from moe_export.commands.console import Console
from moe_export.export.axes.analysis import meanings_of
from moe_export.export.axes.by_line import lines_of
from moe_export.export.frontend.load import load_subject
from moe_export.export.options import Options
from moe_export.export.stages import PIPELINE, Model, Program, between, run


def run_axes(model: str, init: tuple[str, ...], inputs: tuple[str, ...], console: Console) -> int:
    """Run the command; the exit code."""
    options = Options(gates=False)
    with console.user_code():
        with console.step(f"loading {model}"):
            subject = load_subject(model, init=init, inputs=inputs)
        begun = Model.of(subject, options.dims)
        program: Program = run(between(PIPELINE[0].name, "trace"), begun, options, console.step)
        traced = program.traced
        names = {symbol: dim.name for dim in traced.dims for symbol in (dim.symbol, *dim.also)}
        lines = lines_of(traced.program.graph, meanings_of(traced.program.graph, names), names)
        outlined: Program = run(between("outline", "outline"), program, options, console.step)
    blocks = [f"{block.experts.count} experts at {block.experts.line}" for block in outlined.blocks]
    for line in lines:
        console.say(str(line))
    for block in blocks:
        console.say(f"{block}: understood, and replaced by pairs of tokens and experts")
    for note in outlined.notes:
        console.say(f"note: {note}")
    document = {
        "lines": [
            {"place": line.place, "text": line.text, "values": list(line.values), "lost": list(line.lost)}
            for line in lines
        ],
        "experts": blocks,
        "notes": list(outlined.notes),
    }
    console.json(json.dumps(document, indent=2))
    return 0
