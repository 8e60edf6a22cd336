"""`DataFile`: a file that is hashed while it is written, as fast as the disk takes it.

```
                                                      ┌─▶ a thread: SHA-256 ─┐
bytes, or files read by threads ─▶ block of 8 MiB ────┤                      ├─▶ the block is used again
                                                      └─▶ a thread: the file ┘
```
A whole block goes to the disk without another copy in the system's memory (`disk`): of files that are larger than the
memory, that copy costs more than the disk. The last block of a file is written in the ordinary way.
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

from moe_export.disk import AT_ONCE, BLOCK, PAGE, read_exactly, set_direct

_BLOCKS = AT_ONCE + 3


class DataFile(AbstractContextManager["DataFile"]):
    """A new file, written from its beginning to its end.

    Attributes:
        digest: SHA-256 of the whole, once it is closed.

    Raises:
        OSError: The disk refuses; told by a later call, or when the file is closed.
        UsageError: A file that is copied from ends early; told in the same way.
    """

    def __init__(self, path: Path) -> None:
        self.digest = ""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct = set_direct(self._file, True)
        self._hash = hashlib.sha256()
        self._readers = ThreadPoolExecutor(AT_ONCE)
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._blocks = [memoryview(mmap.mmap(-1, BLOCK)) for _ in range(_BLOCKS)]
        self._pending: list[list[Future[None]]] = [[] for _ in range(_BLOCKS)]
        self._turn = 0  # the block that is filled
        self._filled = 0
        self._coming: list[Future[None]] = []  # what is being read into it
        self._before = 0  # bytes in the blocks before it

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._before + self._filled

    def align(self) -> int:
        """Go on at a page; where that is."""
        self.write(b"\0" * (-self.size % PAGE))
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
        """Write what stands in another file, which must not change before this one is closed."""
        while length:
            room = self._room(length)
            self._coming.append(self._readers.submit(read_exactly, path, room, offset))
            offset, length = offset + room.nbytes, length - room.nbytes
            self._take(room.nbytes)

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
        block, at, coming = self._blocks[self._turn][: self._filled], self._before, self._coming
        self._pending[self._turn] = [
            self._hasher.submit(self._add, block, coming),
            self._writer.submit(self._put, block, at, coming),
        ]
        self._before, self._filled, self._coming = at + self._filled, 0, []
        self._turn = (self._turn + 1) % _BLOCKS

    def _add(self, block: memoryview, coming: list[Future[None]]) -> None:
        for done in coming:
            done.result()
        self._hash.update(block)

    def _put(self, block: memoryview, at: int, coming: list[Future[None]]) -> None:
        for done in coming:
            done.result()
        while block.nbytes:
            if self._direct and block.nbytes % PAGE:
                self._direct = set_direct(self._file, False)
            try:
                count = os.pwrite(self._file, block, at)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._direct = set_direct(self._file, False)  # it took the flag and does not do it
                continue
            block, at = block[count:], at + count

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None and self._filled:
                self._send()
            for pool in (self._readers, self._hasher, self._writer):
                pool.shutdown(cancel_futures=kind is not None)
            if kind is None:
                for future in (future for done in self._pending for future in done):
                    future.result()
                self.digest = self._hash.hexdigest()
        finally:
            os.close(self._file)
