"""`moe-export rewrite EQUATION`: the plan of an einsum, and the PyTorch lines that replace it."""

from __future__ import annotations

import json
import re

from moe_export.console import Console
from moe_export.einsum_rewrite import plan_einsum
from moe_export.einsum_rewrite.python_source import to_python
from moe_export.errors import UsageError


def run_rewrite(equation: str, shapes: str | None, quiet: bool, as_json: bool, debug: bool) -> int:
    """Run the command; the exit code."""
    console = Console(quiet, as_json)
    plan = plan_einsum(equation, *parse_shapes(shapes))
    code = to_python(plan)
    console.say(str(plan))
    console.say()
    console.say(code)
    console.json(json.dumps({"equation": equation, "plan": str(plan), "python": code}, indent=2))
    return 0


def parse_shapes(text: str | None) -> list[tuple[int, ...]]:
    """`2x64x256,256x16` → `[(2, 64, 256), (256, 16)]`; an empty part or `scalar` is a scalar."""
    if text is None:
        return []
    shapes = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*(scalar|\d+(x\d+)*)?\s*", part):
            raise UsageError(
                f"--shapes: {part!r} is not a shape", hint="for example: --shapes 2x64x256,256x16"
            )
        shapes.append(tuple(int(size) for size in re.findall(r"\d+", part)))
    return shapes
