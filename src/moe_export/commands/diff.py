"""`moe-export diff before.onnx after.onnx`: what differs between two graphs, as text, JSON, or a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from moe_export.commands.console import Console
from moe_export.commands.view import require_svg, write_svg
from moe_export.options.sizes import parse_one_set
from moe_export.pictures.differing import (
    FIGURES,
    Difference,
    DifferenceEntry,
    MeasuredGraph,
    difference,
    listed,
    marks_of,
)
from moe_export.pictures.groups import knows_modules, opened_of
from moe_export.pictures.sketch import Level, Sketch, sketch_of

SCHEMA: Final = "moe-export/diff/1"


class DiffDocument(DifferenceEntry):
    """What differs between two graphs: `moe-export diff --json`."""

    schema: Literal["moe-export/diff/1"]


Row = tuple[str, str, str, str]
_NAMES = {
    "nodes": "nodes",
    "parameters": "parameters",
    "weight_bytes": "weights, bytes",
    "flops": "FLOPs",
    "activation_bytes": "activations, bytes",
}


def run_diff(
    before: str,
    after: str,
    sizes: tuple[str, ...],
    output: str | None,
    level: Level | None,
    console: Console,
    force: bool = False,
) -> int:
    """Run the command; the exit code: 0, whether or not they differ."""
    if output is not None:
        require_svg(output, [Path(before), Path(after)], force)
    with console.step("counting"):
        found = difference(Path(before), Path(after), parse_one_set(sizes))
    if output is not None:
        write_svg(output, *sketches_of(found, level), force=force)
    document: DiffDocument = {"schema": SCHEMA, **found.to_dict()}
    console.json(json.dumps(document, indent=2))
    _show(found, console)
    if output is not None:
        console.say(f"written: {output}")
    return 0


def sketches_of(
    found: Difference, level: Level | None = None
) -> tuple[list[Sketch], list[dict[str, str]], tuple[str, str]]:
    """Both as sketches, their marks, and words over them; at block level the same modules are opened in both."""
    sides = (found.before, found.after)
    graphs = [side.model.graph for side in sides]
    if level is None:
        level = "blocks" if all(map(knows_modules, graphs)) else "nodes"
    opened = set.intersection(*map(opened_of, graphs)) if level == "blocks" else None
    own, other = (sketch_of(side.model, side.name, level, opened) for side in sides)
    return [own, other], [marks_of(own, other), marks_of(other, own)], ("before", "after")


def figures_of(found: Difference) -> list[Row]:
    """What both are in numbers: (what, before, after, difference)."""
    return [_row(_NAMES[name], found.before.figures[name], found.after.figures[name]) for name in FIGURES]


def operators_of(found: Difference) -> list[Row]:
    """The operators of which one has more, the greatest change first."""
    changed = {name: counts for name, counts in found.operators.items() if counts[0] != counts[1]}
    by_change = sorted(changed.items(), key=lambda item: (-abs(item[1][1] - item[1][0]), item[0]))
    return [_row(name, *counts) for name, counts in by_change]


def _show(found: Difference, console: Console) -> None:
    before, after = found.before, found.after
    changed = operators_of(found)
    rows = [("", "before", "after", "difference"), *figures_of(found)]
    rows += [("nodes by operator", "", "", "")] * bool(changed)
    rows += [(f"  {name}", old, new, more) for name, old, new, more in changed]
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    console.say(f"{before.name} → {after.name}")
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        console.say("  ".join([name.ljust(first), *padded]).rstrip())
    console.say()
    for line in _lines(found, len(found.operators) - len(changed)):
        console.say(line)


def _row(name: str, old: int | None, new: int | None) -> Row:
    return name, _figure(old), _figure(new), _change(old, new)


def _figure(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _change(old: int | None, new: int | None) -> str:
    if old is None or new is None:
        return ""
    return f"{new - old:+,}" if new != old else "the same"


def _lines(found: Difference, same: int) -> Iterator[str]:
    before, after = found.before, found.after
    if same:
        yield f"operators of which both have as many: {same}"
    for name in dict.fromkeys([*before.opsets, *after.opsets]):
        old, new = before.opsets.get(name, "none"), after.opsets.get(name, "none")
        yield f"opset{'' if name == 'onnx' else f' of {name}'}: {old if old == new else f'{old} → {new}'}"
    for name, (was, now) in found.ports.items():
        yield f"{name}: {was or 'none'} → {now or 'none'}"
    if not found.ports:
        yield "inputs and outputs: the same"
    values = found.values
    if values:
        yield f"names of values: {len(values['both'])} in both"
        for word in ("before", "after"):
            if values[f"only_{word}"]:
                yield f"  only {word}: {listed(values[f'only_{word}'])}"
    for word, side in (("before", before), ("after", after)):
        yield f"counted {word}: {_counted(side)}"


def _counted(side: MeasuredGraph) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in side.sizes.items())
    uncounted = f", without the FLOPs of {', '.join(side.uncounted)}" if side.uncounted else ""
    reason = f"; FLOPs and activations are not known: {side.reason}" if side.reason else ""
    return f"at {sizes or 'its sizes'}{uncounted}{reason}"
