"""Lines of the user's code: which one raised, and which one a traced node comes from."""

from __future__ import annotations

import functools
import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_ENTRIES: set[str] = set()
_OWN_ROOMS = ("moe_export", "moe_export.einsum_rewrite", "moe_export.export", "moe_export.verify")


@cache
def _library_folders() -> tuple[Path, ...]:
    """Folders whose files are not the user's: Python's, installed packages', and this tool's own rooms."""
    folders = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")]
    return (*folders, *_own_folders())


@cache
def _own_folders() -> tuple[Path, ...]:
    folders = []
    for room in _OWN_ROOMS:
        spec = find_spec(room)
        if spec is not None and spec.origin is not None:
            folders.append(Path(spec.origin).resolve().parent)
    return tuple(folders)


@cache
def is_own_file(path: str) -> bool:
    """Whether a file belongs to this tool."""
    return any(folder in Path(path).resolve().parents for folder in _own_folders())


@cache
def is_user_file(path: str) -> bool:
    """Whether a file is the user's: not the standard library, an installed package, or the tool itself."""
    if path.startswith(("<", "torch/")):
        return False
    # A folder is looked up once for all the files in it: a process has thousands.
    return _is_user_folder(os.path.dirname(os.path.realpath(path) if os.path.islink(path) else path))


@cache
def _is_user_folder(path: str) -> bool:
    folder = Path(path).resolve()
    folders = (folder, *folder.parents)
    # An environment may see the packages of another one (`--system-site-packages`, PYTHONPATH).
    if any(folder.name in ("site-packages", "dist-packages") for folder in folders):
        return False
    return not any(folder in folders for folder in _library_folders())


@cache
def is_installed(path: str) -> bool:
    """Whether a file that counts as the user's lies in a folder that `pip install --target` filled."""
    return any(_is_filled(folder) for folder in Path(path).resolve().parents if str(folder) in sys.path)


@cache
def _is_filled(folder: Path) -> bool:
    return any(folder.glob("*.dist-info"))


def inside_call(frames: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The frames below the place where this tool calls the user's code: whoever called the tool is left out."""
    entries = [index for index, frame in enumerate(frames) if frame.filename in _ENTRIES]
    return list(frames[entries[-1] + 1 :] if entries else frames)


def calls_user_code(file: str) -> None:
    """Note that a file of this tool calls the user's code; it says so itself, with its `__file__`."""
    _ENTRIES.add(file)


def running_line() -> str | None:
    """`file:line` of the user's innermost line that runs right now, or of a library's model; None outside a model."""
    frames = inside_call(traceback.extract_stack())
    mine = [frame for frame in frames if is_user_file(frame.filename)]
    library = [frame for frame in frames if is_library_model(frame.filename)]
    chosen = mine or library
    return _place(chosen[-1]) if chosen else None


def last_user_line(error: BaseException) -> str | None:
    """`file:line` of the innermost frame of the user's own code; None if the user's code is not in it."""
    frames = inside_call(traceback.extract_tb(error.__traceback__))
    mine = [frame for frame in frames if is_user_file(frame.filename)]
    return _place(mine[-1]) if mine else None


def last_model_line(error: BaseException) -> str | None:
    """The user's innermost line; where a library's model raised, the innermost line of that library."""
    frames = inside_call(traceback.extract_tb(error.__traceback__))
    library = [frame for frame in frames if is_library_model(frame.filename)]
    return last_user_line(error) or (_place(library[-1]) if library else None)


@cache
def is_library_model(path: str) -> bool:
    """Whether a file may define a library's model: neither PyTorch nor this tool."""
    return Path(path).is_absolute() and f"{os.sep}torch{os.sep}" not in path and not is_own_file(path)


def _place(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).resolve()}:{frame.lineno}"


def model_frame(stack_trace: str | None) -> tuple[str, int] | None:
    """File and line of the innermost frame of a model's code in a traced node's stack trace, a library's included."""
    for match in reversed(list(_FRAME.finditer(stack_trace or ""))):
        if is_library_model(match["file"]):
            return match["file"], int(match["line"])
    return None


@functools.lru_cache(maxsize=4096)  # asked of each loop that is tried
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


def line_and_text(stack_trace: str | None) -> str | None:
    """`file:line` as of `line_of`, and below it what stands on the line."""
    line = line_of(stack_trace)
    if line is None:
        return None
    path, _, number = line.rpartition(":")
    text = linecache.getline(path, int(number)).strip()
    return f"{line}\n{text}" if text else line


def forward_line(module: object) -> str | None:
    """Where the user wrote `forward`; None if a library did."""
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    if code is None or not is_user_file(code.co_filename):
        return None
    return f"{code.co_filename}:{code.co_firstlineno}"
