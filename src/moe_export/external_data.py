"""Weights that lie beside a graph: may they be read, and are they the ones that the graph was written with?

A graph says in its metadata (`moe_export.data`) how large each of its data files was, when it was written, and its
SHA-256. A file of another time is read once and held against that; one of another size is another file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from moe_export.disk import blocks
from moe_export.errors import UsageError

FACT = "moe_export.data"
_MARK = b"\n\x08location"  # how protobuf writes the key of an external tensor's file
_seen: dict[tuple[str, int, int, int], str] = {}
_ahead: dict[tuple[str, int, int, int], Future[str]] = {}
_lock = threading.Lock()


def fingerprint(path: Path) -> dict[str, Any]:
    """Size, time (ns) and SHA-256 of a file; read once a process."""
    state = path.stat()
    return {"size": state.st_size, "time": state.st_mtime_ns, "sha256": _digest(path, state)}


def remember(path: Path, digest: str) -> None:
    """Note the SHA-256 of a file that was just written, so that it need not be read."""
    state = path.stat()
    with _lock:
        _seen[_key(path, state)] = digest


def _key(path: Path, state: os.stat_result) -> tuple[str, int, int, int]:
    return str(state.st_dev), state.st_ino, state.st_size, state.st_mtime_ns


def _digest(path: Path, state: os.stat_result) -> str:
    key = _key(path, state)
    with _lock:
        known, coming = _seen.get(key), _ahead.get(key)
    if known is not None:
        return known
    found = _read(path, threading.Event()) if coming is None else coming.result()
    with _lock:
        _seen[key] = found
    return found


def _read(path: Path, stop: threading.Event) -> str:
    found = hashlib.sha256()
    for block in blocks(path):
        if stop.is_set():
            raise CancelledError
        found.update(block)
    return found.hexdigest()


class ReadAhead(AbstractContextManager["ReadAhead"]):
    """Has files read for their SHA-256 beside other work, on one thread; ends with the reading at the end."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._stop = threading.Event()
        self._keys: list[tuple[str, int, int, int]] = []

    def read(self, paths: Iterable[Path]) -> None:
        """Begin; who asks for the fingerprint of one of these files waits until it was read."""
        for path in paths:
            key = _key(path, path.stat())
            with _lock:
                if key in _seen or key in _ahead:
                    continue
                _ahead[key] = self._pool.submit(_read, path, self._stop)
            self._keys.append(key)

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        with _lock:
            for key in self._keys:
                del _ahead[key]


def check_external_data(path: str | Path) -> None:
    """Refuse a graph whose weights must not be read, or are no longer those that it was written with.

    Args:
        path: An `.onnx` file; what is no ONNX file is left to those who read it.

    Raises:
        UsageError: A data file lies outside the graph's folder, is missing, ends too early, or has changed.
    """
    path = Path(path)
    if not path.is_file() or not _mentions_files(path):
        return
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # its reader says what is wrong with it
        return
    check_places(_places(model.graph), path, {entry.key: entry.value for entry in model.metadata_props})


def check_places(
    places: Iterable[tuple[str, str, int, int]], path: Path, metadata: Mapping[str, str]
) -> None:
    """Check external tensors, given as name, location, offset and length, of the graph at `path`."""
    folder = path.parent.resolve()
    ends: dict[str, tuple[int, str]] = {}
    for name, location, offset, length in places:
        ends[location] = max(ends.get(location, (0, name)), (offset + length, name))
    known = _known(metadata)
    for location, (end, name) in ends.items():
        file = path.parent / location
        if Path(location).is_absolute() or not file.resolve().is_relative_to(folder):
            raise UsageError(
                f"{path.name} takes the weight {name} from {location}, which is outside its folder",
                where=str(path),
                hint="move the file beside the graph; one from elsewhere could be any file of yours",
            )
        if not file.is_file():
            raise UsageError(
                f"{path.name} has its weights in {location}, which is not there", where=str(path)
            )
        if file.stat().st_size < end:
            raise UsageError(f"{location} is cut off: it ends before {name} does", where=str(path))
        if location in known:
            _check_unchanged(file, location, known[location], path)


def _known(metadata: Mapping[str, str]) -> Mapping[str, Mapping[str, Any]]:
    try:
        found = json.loads(metadata.get(FACT, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _check_unchanged(file: Path, location: str, known: Mapping[str, Any], path: Path) -> None:
    state = file.stat()
    same = state.st_size == known.get("size")
    if same and state.st_mtime_ns == known.get("time"):
        return
    if not same or _digest(file, state) != known.get("sha256"):
        raise UsageError(
            f"{location} has changed since {path.name} was written with it",
            where=str(path),
            hint="export again, or put the file back that it was exported with",
        )


def _mentions_files(path: Path) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(_MARK) >= 0


def _places(graph: Any) -> Iterator[tuple[str, str, int, int]]:
    """Name, file, offset and length of every tensor outside, in graphs inside nodes, too."""
    import onnx

    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            yield (
                tensor.name,
                entry.get("location", ""),
                int(entry.get("offset", 0)),
                int(entry.get("length", 0)),
            )
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _places(inner)
