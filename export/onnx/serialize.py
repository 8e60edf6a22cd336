"""Write files whole or not at all.

Everything is first written into a hidden folder beside its place, can be checked there, and is then moved, so that
a failure, a full disk or Ctrl-C leaves neither half a file nor a damaged older one. What a process that was killed has
left behind, the next one takes away. Files move in this order: a report that is there goes, then come data files
(called after their content, so that no graph finds another's), graphs, and the new report at the end: without it, an
export is not whole.
"""

from __future__ import annotations

import filecmp
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx_ir as ir

from moe_export.errors import UsageError
from moe_export.export.onnx.external_weights import (
    DATA_SUFFIX,
    Storage,
    Streamed,
    held,
    stream_weights,
    taken_along,
)
from moe_export.own_files import kind_of, mentions, require_free

try:
    import fcntl as _locks
except ImportError:  # no locks, so what a killed process left is left
    _locks = None  # type: ignore[assignment]
_HAS_LOCKS = _locks is not None

_INLINE_LIMIT = 2**31 - 2**24  # protobuf cannot hold 2 GiB; room is left for the nodes
_STAGING = ".moe-export-unfinished-"
_LEFT = re.compile(re.escape(_STAGING) + r"[a-z0-9_]{8}")  # as `mkdtemp` calls them, and nobody else
_REPORT = ".report.json"
_DATA = re.compile(r"(?P<graph>.+\.onnx)\.[0-9a-f]{12}\.\d+\.data")
_TRIES = 3
_LEAST = 1024
"""Bytes from which a weight of a large graph is put outside it."""


@contextmanager
def staging(folder: Path, *, inputs: Sequence[Path] = (), force: bool = False) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends without an error.

    Args:
        folder: Made if it is not there, and unmade again if it was made for nothing.
        inputs: What the command reads: not to be overwritten.
        force: Overwrite that, and files that are not ours, nevertheless.

    Raises:
        UsageError: The folder cannot be made or written to, or the disk is full; a file is in the way.
    """
    made: list[Path] = []
    try:
        temporary, lock = _made(folder, made)
    except OSError as error:
        _unmake(made)
        raise _unwritable(folder, error) from error
    owner, done = os.getpid(), False
    try:
        yield temporary
        _move(temporary, folder, inputs, force)
        done = True
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        if os.getpid() == owner:  # not a process that the user's code forked, and that comes this way, too
            shutil.rmtree(temporary, ignore_errors=True)
            if lock is not None:
                os.close(lock)
            if not done:
                _unmake(made)


def _made(folder: Path, made: list[Path]) -> tuple[Path, int | None]:
    """A temporary folder in one that is made if it is not there; the list gets what had to be made.

    A folder of another export that fails just now may be gone again at any moment, so this is tried more than once.
    """
    for _ in range(_TRIES - 1):
        with suppress(FileNotFoundError):
            return _own_folder(_with_parents(folder, made))
    return _own_folder(_with_parents(folder, made))


def _with_parents(folder: Path, made: list[Path]) -> Path:
    for path in (*reversed(folder.parents), folder):
        if path.is_dir():
            continue
        try:
            path.mkdir()
            made.append(path)
        except FileExistsError:
            if not path.is_dir():  # it is a file
                raise
    return folder


def _unmake(made: Sequence[Path]) -> None:
    """Remove folders that were made for nothing, the innermost first; one that somebody has put a file into stays."""
    for folder in reversed(made):
        with suppress(OSError):
            folder.rmdir()


def _own_folder(folder: Path) -> tuple[Path, int | None]:
    """A new hidden folder, locked as long as this process lives; those that nobody has locked are removed."""
    if not _HAS_LOCKS:
        return Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder)), None
    outer = os.open(folder, os.O_RDONLY)
    try:
        _locks.flock(outer, _locks.LOCK_EX)
        for left in folder.glob(f"{_STAGING}*"):
            if _LEFT.fullmatch(left.name) is None:
                continue
            with suppress(OSError):
                lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    _locks.flock(lock, _locks.LOCK_EX | _locks.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(lock)
        temporary = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
        mine = os.open(temporary, os.O_RDONLY)
        _locks.flock(mine, _locks.LOCK_EX)
        return temporary, mine
    finally:
        os.close(outer)


def _move(temporary: Path, folder: Path, inputs: Sequence[Path], force: bool) -> None:
    def turn(name: str) -> tuple[int, str]:
        return (0 if name.endswith(DATA_SUFFIX) else 2 if name.endswith(_REPORT) else 1), name

    names = sorted(
        (name for name in os.listdir(temporary) if not _is_there(temporary, folder, name)), key=turn
    )
    for name in names:
        require_free(folder / name, kind_of(temporary / name), inputs=inputs, force=force)
    superseded = [path for name in names for path in _data_of(folder / name) if path.name not in names]
    for name in names:
        if name.endswith(_REPORT):
            (folder / name).unlink(missing_ok=True)
    for name in names:
        os.replace(temporary / name, folder / name)
    for path in superseded:  # unless some other graph in the folder names them
        if not any(mentions(other, path.name.encode()) for other in folder.rglob("*.onnx")):
            path.unlink(missing_ok=True)


def _is_there(temporary: Path, folder: Path, name: str) -> bool:
    """Whether it stands in the folder already: weights that are referenced, or a copy of a file that is not ours."""
    mine, other = temporary / name, folder / name
    if not other.exists():
        return False
    if mine.is_dir() or other.samefile(mine):
        return True
    return kind_of(mine) is None and filecmp.cmp(mine, other, shallow=False)


def _data_of(graph: Path) -> list[Path]:
    """The data files of older exports of a graph, and of those that were killed half-way."""
    if graph.suffix != ".onnx":
        return []
    found = graph.parent.glob(f"{glob.escape(graph.name)}.*{DATA_SUFFIX}")
    return [path for path in found if _is_data_of(path.name, graph.name)]


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write to {folder}: {error.strerror or error}",
        hint="choose another folder with -o, or make room",
    )


def write_model(model: ir.Model, path: Path, storage: Storage | None = None) -> Streamed:
    """Write one `.onnx` file; beside it the weights that come from files, and those of 2 GiB and more.

    Args:
        model: Its recipes, and the weights that do not fit inside, become external tensors.
        path: The file.
        storage: How weights are stored outside.

    Returns:
        What was stored outside.
    """
    inside = sum(
        v.const_value.nbytes
        for v in model.graph.initializers.values()
        if v.const_value is not None and not isinstance(v.const_value, ir.ExternalTensor)
    )
    if inside > _INLINE_LIMIT:
        held(model, _LEAST)
    storage = storage or Storage()
    taken_along(model, {path.parent.resolve(), (storage.folder or path.parent).resolve()})
    found = stream_weights(model, path, storage)
    ir.save(model, path)
    return found


def rename_model(path: Path, name: str) -> None:
    """Give a graph, and the data files that are called after it, another name.

    Args:
        path: The graph.
        name: The other name of its file.
    """
    names = [other.name for other in path.parent.iterdir() if _is_data_of(other.name, path.name)]
    if not names:
        path.rename(path.with_name(name))
        return
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value in names:
                entry.value = name + entry.value.removeprefix(path.name)
    for entry in model.metadata_props:
        for old in names:
            entry.value = entry.value.replace(json_text(old), json_text(name + old.removeprefix(path.name)))
    for old in names:
        path.with_name(old).rename(path.with_name(name + old.removeprefix(path.name)))
    onnx.save(model, path.with_name(name))
    path.unlink()


def _is_data_of(name: str, graph: str) -> bool:
    match = _DATA.fullmatch(name)
    return match is not None and match["graph"] == graph


def json_text(name: str) -> str:
    """A name as it stands in JSON."""
    return f'"{name}"'


def link_weights(model: ir.Model, path: Path, folder: Path) -> bool:
    """Let a graph that stands elsewhere for now be run: its referenced files get a second name beside it.

    Args:
        model: The graph.
        path: Where it stands.
        folder: Where it will stand, and its files do.

    Returns:
        Whether they could be linked.
    """
    locations = {
        str(value.const_value.location)
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    for location in locations:
        link, file = path.parent / location, folder / location
        if link.exists():
            continue
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, link)
        except OSError:  # another disk, or not ours
            return False
    return True
