"""What the report says of folded loops: what each became, how far it is right, which sizes stay fixed."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from moe_export.errors import Code
from moe_export.export.frontend.subject import Subject
from moe_export.export.recurrence.fold import FoldedModule
from moe_export.export.recurrence.loop_body import LoopBody
from moe_export.export.recurrence.reach import Reach
from moe_export.export.recurrence.rolled import Folded, LengthError, RolledGraph
from moe_export.export.tracing.lengths import Length
from moe_export.export.tracing.trace import Traced


def named(length: Length) -> str:
    """A length by the axes whose size it is: `x:1 and mask:0`."""
    return " and ".join(f"{name}:{axis}" for name, axis in length.axes)


def at(error: LengthError) -> str:
    """The line that an error names, in brackets."""
    return f" ({error.where})" if error.where else ""


def folded_loops(
    whole: RolledGraph, module: FoldedModule, lengths: Sequence[Length], subject: Subject
) -> list[str]:
    """What each loop ran over, and what it became."""
    bodies = [node.target for node in module.graph.nodes if isinstance(node.target, LoopBody)]
    become = {body.number: "computed for all steps together" for body in bodies if body.at_once}
    return [
        f"loop at {_near(item.loop.line, subject)}: {_steps(item.loop.iterations, lengths)}, "
        f"{len(item.loop.body)} ops per step, {become.get(item.number, 'folded into one Scan')}"
        for item in whole.items
        if isinstance(item, Folded)
    ]


def _steps(iterations: Any, lengths: Sequence[Length]) -> str:
    """What a loop runs over: a length, the product of all, or a formula of one of them."""
    of = getattr(iterations, "of", 0)
    of_them = lengths[of : of + 1] or lengths
    shape = " * ".join(
        " and ".join(f"{name}.shape[{axis}]" for name, axis in length.axes) for length in of_them
    )
    return f"over {shape}" if str(iterations) == "L" else f"{iterations} steps for L = {shape}"


def _near(line: str | None, subject: Subject) -> str:
    """A `file:line` relative to the model's folder; a library's from its package on."""
    parts = Path(line or "?").parts
    installed = [place for place, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    if line is None or installed:
        return str(Path(*parts[installed[-1] + 1 :])) if installed else "?"
    return os.path.relpath(line, subject.source.parent)


def limits(lengths: Sequence[Length], reached: Sequence[Reach]) -> list[str]:
    """Lengths beyond which the model does something else."""
    return [
        f"{named(length)}: the model does something else after length {each.limit}, and the graph ends there"
        for length, each in zip(lengths, reached, strict=True)
        if each.limit is not None
    ]


def left_fixed(
    traced: Traced,
    lengths: Sequence[Length],
    folded: Collection[tuple[str, int]],
    staying: LengthError | None,
) -> list[str]:
    """Sizes that stay fixed: other lengths that are looped over (an image's width), and the tracer's.

    Args:
        traced: The trace of the model at a short length.
        lengths: All that it loops over.
        folded: The (input, axis) pairs that were folded over.
        staying: Why a loop over another length cannot be folded.
    """
    looped = {place for length in lengths for place in length.axes} - {*folded}
    shapes = traced.inputs
    why = "the loop runs over it, too, and is folded over one length"
    if staying is not None:
        why = f"a loop over it cannot be folded: {staying.reason}{at(staying)}"
    return [
        Code.LOOP.mark(f"{name}: length {shapes[name][axis]} is fixed (dimension {axis}): {why}")
        for name, axis in sorted(looped)
        if isinstance(shapes[name][axis], int)
    ] + [
        str(fixed)
        for fixed in traced.fixed
        if fixed.model_takes_others and (fixed.input, fixed.axis) not in looped | {*folded}
    ]
