"""`moe-export script.py --list`: every call of a script that can be exported, with its line and its shapes."""

from __future__ import annotations

import json
from pathlib import Path

from moe_export.commands.console import Console
from moe_export.errors import UsageError
from moe_export.export.frontend.ended import no_exit
from moe_export.export.frontend.load import split_spec
from moe_export.export.frontend.script import calls_in
from moe_export.export.frontend.watch import Call


def list_calls(spec: str, console: Console) -> int:
    """Run a script to its end, and show what it calls.

    Raises:
        UsageError: There is no such file, it calls nothing, or fails before it does.
    """
    path, name = split_spec(spec)
    if name is not None:
        raise UsageError(
            f"--list shows the calls of a script, and {spec} names one thing in it",
            hint=f"{path.name} --list",
        )
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    with console.user_code(), console.step(f"running {spec}"), no_exit():
        calls, failed = calls_in(path)
    if not calls:
        raise UsageError(
            f"{path.name} calls no exporter and no module",
            hint="name a class in it: moe-export model.py:CLASS",
        )
    rows = [_row(call, path) for call in calls]
    document = [
        {"line": line, "call": how, "model": model, "inputs": list(call.shapes)}
        for (line, how, model), call in zip(rows, calls, strict=True)
    ]
    console.json(json.dumps(document, indent=2))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for number, (row, call) in enumerate(zip(rows, calls, strict=True), 1):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.say(f"{number:>2}  {cells}  {', '.join(call.shapes)}")
    if failed is not None:
        console.say(f"note: the script fails after these: {failed.what} ({failed.where})")
    console.say(f"export one: moe-export {path.name} --call {len(rows)}")
    return 0


def _row(call: Call, path: Path) -> tuple[str, str, str]:
    """The line, how it is called, the model's class."""
    file, _, line = (call.where or "").rpartition(":")
    where = f"{Path(file).name}:{line}" if file else path.name
    return where, call.exporter or "a call", type(call.module).__name__
