"""What a model's code does for an expert that no token chose, read off the statement that asks.

    if mask.any(): out[mask] += ...            nothing: such an expert may be traced as if it had tokens
    if rows.numel() == 0: continue             nothing
    if rows.numel() == 0: break                it leaves the loop
    if rows.numel(): ... else: out = out + 1   something else

A trace sees one way only, so this is not in it.
"""

from __future__ import annotations

import ast
import linecache
import os
from collections.abc import Iterator
from types import FrameType

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.source import is_library_model
from moe_export.export.torch_compat import frames as torch_compat


def asking_frame() -> FrameType | None:
    """The frame of the model's code that asks for the truth of a value right now; None where PyTorch does."""
    return torch_compat.asking_frame(is_library_model)


def place_of(frame: FrameType) -> str:
    """`file:line` that a frame is at."""
    return f"{os.path.abspath(frame.f_code.co_filename)}:{frame.f_lineno}"


def require_nothing(frame: FrameType, hit: bool) -> None:
    """Make sure that the statement at hand does nothing for an expert without tokens.

    Args:
        frame: Where the question is asked.
        hit: The answer for an expert with tokens; `if not ...` turns it round.

    Raises:
        NotExportableError: It leaves the loop, or computes something.
    """
    for statement in _asking(frame):
        turned = isinstance(statement.test, ast.UnaryOp) and isinstance(statement.test.op, ast.Not)
        for each in statement.orelse if hit is not turned else statement.body:
            if isinstance(each, (ast.Break, ast.Return)):
                _refuse(frame, "leaves the loop at an expert without tokens")
            if isinstance(each, (ast.Assign, ast.AugAssign)):
                _refuse(frame, "computes something for an expert without tokens")


def refuse_number(frame: FrameType) -> None:
    """Refuse a question about how many tokens an expert has, other than whether it has any.

    Raises:
        NotExportableError: Always.
    """
    _refuse(frame, "asks how many tokens an expert has")


def _refuse(frame: FrameType, what: str) -> None:
    raise NotExportableError(
        f"a condition {what}, and a graph has all experts in it",
        code=Code.TOKEN_COUNT,
        where=place_of(frame),
        hint="compute it for every expert, and choose with torch.where or a mask",
    )


def _asking(frame: FrameType) -> Iterator[ast.If]:
    """The `if` whose condition stands on the line that runs."""
    lines = linecache.getlines(frame.f_code.co_filename)
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and node.test.lineno <= frame.f_lineno <= (node.test.end_lineno or 0):
            yield node
