"""Which files are ours, so that nothing else is ever overwritten: one decision, for everything that is written.

A file may be replaced if it is empty, or if it is ours and of the kind that takes its place; not if the command reads
it. Anything else is somebody's work: it stays, unless `--force` was given. What is ours says so, wherever it lies:

| file | mark |
|---|---|
| graph | `producer_name`, or metadata, in ONNX: `moe_export.source`, `moe_export.rewritten` |
| report, manifest | `"schema": "moe-export/..."`; in `genai_config.json`, whose reader allows no more, the `log_id` |
| tensors | metadata `moe_export...` of a safetensors file |
| page, picture, JUnit XML, script | the words `generator: moe-export` near its beginning |
| arrays (`.npz`) | the same words as the archive's comment |
| weights beside a graph | the graph, which is ours, names them; or they are called after their content |
| engine, and its layers | a report of ours beside it names them |
"""

from __future__ import annotations

import filecmp
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from moe_export.errors import UsageError

MARK = "generator: moe-export"
"""What text and pictures that we write have near their beginning."""
KEY = "moe_export."
"""Begins the keys of our metadata, in graphs and in files of tensors."""
_SCHEMA = "moe-export/"
_LOG = "moe-export"
_HEAD = 4096
_PRODUCER, _METADATA = 2, 14
"""Fields of ONNX's ModelProto."""
_LONGEST = 2**20
"""Bytes of a field or a header that is read; ours are far shorter."""
_DATA = re.compile(r"(?P<graph>.+\.onnx)\.(?:(?P<hash>[0-9a-f]{12})\.\d+\.)?data")
_ENGINE = re.compile(r"(?P<stem>.+)\.(engine|layers\.json)")


def kind_of(path: Path) -> str | None:
    """What a file of ours is: `graph`, `report`, `tensors`, `text`, `picture`, `arrays`, `weights`, `engine`.

    Returns:
        None for a file that we did not write, or that cannot be read.
    """
    companion = _companion(path)
    if companion is not None:
        return companion
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            return next((kind for kind, is_it in _KINDS.items() if is_it(file, head)), None)
    except OSError:
        return None


def require_free(target: Path, kind: str | None, *, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """Refuse to overwrite what is not ours.

    Args:
        target: What is to be written.
        kind: Of that, as `kind_of` says.
        inputs: What the command reads.
        force: Overwrite it nevertheless.

    Raises:
        UsageError: It must not be overwritten.
    """
    if (
        force or not target.is_file()
    ):  # a folder is in nobody's way, a pipe or a terminal takes whatever comes
        return
    if any(other.exists() and target.samefile(other) for other in inputs):
        raise UsageError(
            f"{target} is an input of this command, and would be overwritten",
            hint="choose another name, or --force to overwrite it",
        )
    if target.stat().st_size and (kind is None or kind_of(target) != kind):
        raise UsageError(
            f"{target} is there, and is no {kind or 'file'} that moe-export wrote",
            hint="choose another name, or --force to overwrite it",
        )


def put(
    target: Path, write: Callable[[Path], object], *, inputs: Iterable[Path] = (), force: bool = False
) -> None:
    """Write one file beside its place, and move it there: whole or not at all. One that is there keeps its permissions.

    Its folder is made if it is not there.

    Args:
        target: The file. One that has the same content already is left as it is; a pipe or a terminal is written to.
        write: Writes it to the path that it is given.
        inputs: What the command reads.
        force: Overwrite it, whoever's it is.

    Raises:
        UsageError: It must not be overwritten, or cannot be written.
    """
    if target.exists() and not target.is_file():
        _written(target, write, target)
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.moe-export")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _written(temporary, write, target)
        if target.exists() and filecmp.cmp(temporary, target, shallow=False):
            return
        require_free(target, kind_of(temporary), inputs=inputs, force=force)
        if target.exists():
            os.chmod(temporary, target.stat().st_mode)
        os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # its folder may be none
            temporary.unlink()


def _written(path: Path, write: Callable[[Path], object], target: Path) -> None:
    try:
        write(path)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}") from error


def put_text(target: Path, text: str, *, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """`put` for text, as UTF-8."""
    put(target, lambda path: path.write_bytes(text.encode("utf-8")), inputs=inputs, force=force)


def _companion(path: Path) -> str | None:
    """The kind of a file that has no room for a mark, by its name and the files beside it."""
    data, engine = _DATA.fullmatch(path.name), _ENGINE.fullmatch(path.name)
    if data is not None:
        graph = path.with_name(data["graph"])
        named = data["hash"] or (kind_of(graph) == "graph" and mentions(graph, path.name.encode()))
        return "weights" if named else None
    if engine is not None:
        wanted = f'"{engine["stem"]}.engine"'.encode()
        reports = (other for other in path.parent.glob("*.json") if _ENGINE.fullmatch(other.name) is None)
        named = any(mentions(other, wanted) and kind_of(other) == "report" for other in reports)
        return "engine" if named else None
    return None


def mentions(path: Path, text: bytes) -> bool:
    """Whether a file has these bytes, wherever."""
    before = b""
    with path.open("rb") as file:
        while block := file.read(2**24):
            if text in before + block:
                return True
            before = block[-len(text) :]
    return False


def _is_graph(file: BinaryIO, head: bytes) -> bool:
    file.seek(0)
    try:
        return any(
            data == b"moe-export" if number == _PRODUCER else data[2:].startswith(KEY.encode())
            for number, data in _fields(file)
        )
    except ValueError:
        return False


def _fields(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The two fields of a ModelProto that may tell; the graph between them, which may be large, is not read.

    Raises:
        ValueError: It is none.
    """
    while (tag := _varint(file)) is not None:
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _varint(file)
        elif wire == 2:
            length = _varint(file) or 0
            if number in (_PRODUCER, _METADATA) and length <= _LONGEST:
                yield number, file.read(length)
            else:
                file.seek(length, 1)
        elif wire in (1, 5):
            file.seek(8 if wire == 1 else 4, 1)
        else:
            raise ValueError


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError


def _is_report(file: BinaryIO, head: bytes) -> bool:
    if not head.lstrip().startswith(b"{"):
        return False
    file.seek(0)
    try:
        document = json.load(file)
    except ValueError:
        return False
    if not isinstance(document, dict):
        return False
    return str(document.get("schema")).startswith(_SCHEMA) or _log_of(document) == _LOG


def _log_of(document: object) -> object:
    """What a file for onnxruntime-genai calls its session."""
    for name in ("model", "decoder", "session_options", "log_id"):
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _is_tensors(file: BinaryIO, head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length > _LONGEST:
        return False
    file.seek(8)
    try:
        metadata = json.loads(file.read(length)).get("__metadata__", {})
    except ValueError:
        return False
    return any(key.startswith(KEY) for key in metadata)


def _is_arrays(file: BinaryIO, head: bytes) -> bool:
    if not head.startswith(b"PK"):
        return False
    file.seek(max(0, file.seek(0, 2) - _HEAD))
    return file.read().endswith(MARK.encode())


def _is_picture(file: BinaryIO, head: bytes) -> bool:
    return head.startswith(b"\x89PNG") and MARK.encode() in head


def _is_text(file: BinaryIO, head: bytes) -> bool:
    return MARK.encode() in head and b"\0" not in head


_KINDS: dict[str, Callable[[BinaryIO, bytes], bool]] = {
    "report": _is_report,
    "tensors": _is_tensors,
    "arrays": _is_arrays,
    "picture": _is_picture,
    "text": _is_text,
    "graph": _is_graph,
}
