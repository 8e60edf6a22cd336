"""`DataFile`: a file that is hashed while it is written, as fast as the disk takes it.

```
                          ┌─▶ a thread: SHA-256 ─┐
bytes ─▶ block of 8 MiB ──┤                      ├─▶ the block is used again
                          └─▶ a thread: the file ┘
```
What is copied byte for byte is read straight into a block. A whole block goes to the disk without another copy in the
system's page cache (`O_DIRECT`): of files that are larger than the memory, that copy costs more than the disk. A file
system that has no such way, and the last block of a file, are written in the ordinary way.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from moe_export.errors import UsageError

ALIGNMENT = 4096
"""Bytes: a page, so that a tensor can be mapped by itself; and what a disk wants a block to begin at."""
BLOCK = 8 * 2**20
_BLOCKS = 4


class DataFile(AbstractContextManager["DataFile"]):
    """A new file, written from its beginning to its end.

    Attributes:
        digest: SHA-256 of the whole, once it is closed.

    Raises:
        OSError: The disk refuses; told by a later write, or when the file is closed.
    """

    def __init__(self, path: Path) -> None:
        self.digest = ""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct = _set_direct(self._file, True)
        self._hash = hashlib.sha256()
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._blocks = [memoryview(mmap.mmap(-1, BLOCK)) for _ in range(_BLOCKS)]
        self._pending: list[list[Future[None]]] = [[] for _ in range(_BLOCKS)]
        self._turn = 0  # the block that is filled
        self._filled = 0
        self._before = 0  # bytes in the blocks before it
        self._sources = _Sources()

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._before + self._filled

    def align(self) -> int:
        """Go on at a page; where that is."""
        self.write(b"\0" * (-self.size % ALIGNMENT))
        return self.size

    def write(self, data: Any) -> None:
        """Write the bytes of a buffer; it may change after that."""
        view = memoryview(data)
        while view.nbytes:
            room = self._room(view.nbytes)
            room[:] = view[: room.nbytes]
            view = view[room.nbytes :]
            self._take(room.nbytes)

    def write_from(self, path: Path, offset: int, length: int) -> None:
        """Write what stands in another file.

        Raises:
            UsageError: That file ends early.
        """
        while length:
            room = self._room(length)
            count = self._sources.read(path, room, offset)
            offset, length = offset + count, length - count
            self._take(count)

    def _room(self, most: int) -> memoryview:
        """The free part of the block."""
        if not self._filled:
            for done in self._pending[self._turn]:
                done.result()
            self._pending[self._turn] = []
        return self._blocks[self._turn][self._filled : self._filled + most]

    def _take(self, count: int) -> None:
        self._filled += count
        if self._filled == BLOCK:
            self._send()

    def _send(self) -> None:
        """Hand the block over, and go on with the next."""
        block, at = self._blocks[self._turn][: self._filled], self._before
        self._pending[self._turn] = [
            self._hasher.submit(self._hash.update, block),
            self._writer.submit(self._put, block, at),
        ]
        self._before, self._filled = at + self._filled, 0
        self._turn = (self._turn + 1) % _BLOCKS

    def _put(self, block: memoryview, at: int) -> None:
        while block.nbytes:
            if self._direct and block.nbytes % ALIGNMENT:
                self._direct = _set_direct(self._file, False)
            try:
                count = os.pwrite(self._file, block, at)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._direct = _set_direct(self._file, False)  # it took the flag and does not do it
                continue
            block, at = block[count:], at + count

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None and self._filled:
                self._send()
            self._hasher.shutdown(cancel_futures=kind is not None)
            self._writer.shutdown(cancel_futures=kind is not None)
            if kind is None:
                for future in (future for done in self._pending for future in done):
                    future.result()
                self.digest = self._hash.hexdigest()
        finally:
            self._sources.close()
            os.close(self._file)


class _Sources:
    """Files that are copied from, kept open one at a time: weights stand in few files, one behind another."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file = -1

    def read(self, path: Path, target: memoryview, offset: int) -> int:
        if path != self._path:
            self.close()
            self._file, self._path = os.open(path, os.O_RDONLY), path
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # reads further ahead
        count = os.preadv(self._file, [target], offset)
        if not count:
            raise UsageError(
                f"{path} ends before byte {offset + target.nbytes}", hint="is it still being written?"
            )
        return count

    def close(self) -> None:
        if self._path is not None:
            os.close(self._file)
            self._path = None


def _set_direct(file: int, on: bool) -> bool:
    """Write past the page cache from now on, or no longer; whether it is so."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    import fcntl

    now = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, now | flag if on else now & ~flag)
    except OSError:  # the file system has no such way
        return False
    return on
