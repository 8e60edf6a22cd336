"""Lines of the user's code: which one raised, and which one a traced node comes from."""

from __future__ import annotations

import re
import sysconfig
import traceback
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_OWN_ROOMS = ("moe_export", "moe_export.einsum_rewrite", "moe_export.export", "moe_export.verify")


@cache
def _library_folders() -> tuple[Path, ...]:
    """Folders whose files are not the user's: Python's, installed packages', and this tool's own rooms."""
    folders = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")]
    for room in _OWN_ROOMS:
        spec = find_spec(room)
        if spec is not None and spec.origin is not None:
            folders.append(Path(spec.origin).resolve().parent)
    return tuple(folders)


@cache
def is_user_file(path: str) -> bool:
    """Whether a file is the user's: not the standard library, an installed package, or the tool itself."""
    if path.startswith(("<", "torch/")):
        return False
    folders = (Path(path).resolve()).parents
    return not any(folder in folders for folder in _library_folders())


def last_user_line(error: BaseException) -> str | None:
    """`file:line` of the innermost frame of the user's own code; None if the user's code is not in it."""
    mine = [frame for frame in traceback.extract_tb(error.__traceback__) if is_user_file(frame.filename)]
    return f"{Path(mine[-1].filename).resolve()}:{mine[-1].lineno}" if mine else None


def line_of(stack_trace: str | None) -> str | None:
    """`file:line` of the innermost user frame of a traced node's stack trace.

    Falls back to the innermost library frame, which for a library's module is still where to look; a node that
    the tracer made for itself has no line.
    """
    frames = [(match["file"], match["line"]) for match in _FRAME.finditer(stack_trace or "")]
    if not frames:
        return None
    mine = [frame for frame in frames if is_user_file(frame[0])]
    chosen = mine or [frame for frame in frames if Path(frame[0]).is_absolute()]
    return f"{Path(chosen[-1][0]).resolve()}:{chosen[-1][1]}" if chosen else None
