"""Files larger than the memory, read as fast as the disk gives them.

The system keeps what it reads in memory. For files that do not fit there, making room for them costs more than the disk
does, so what it does not have already is read past that memory (`O_DIRECT`), a few blocks at once. Where there is no
such way, files are read in the ordinary one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from moe_export.errors import UsageError

PAGE = 4096
"""Bytes: what begins and ends at a multiple of it can be mapped, and moved past the system's memory."""
BLOCK = 8 * 2**20
AT_ONCE = 3
"""Blocks that are read at once: one keeps a disk waiting."""
_own = threading.local()


def set_direct(file: int, on: bool) -> bool:
    """Go past the system's memory from now on with an open file, or no longer; whether it is so."""
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


def read_into(path: Path, target: memoryview, offset: int) -> int:
    """Fill a buffer of up to `BLOCK` bytes with what a file has from `offset` on.

    Returns:
        The bytes that were read; fewer than wanted where the file ends.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        done = _in_memory(file, target, offset)
        if done < target.nbytes and set_direct(file, True):
            with suppress(OSError):
                done += _direct(file, target[done:], offset + done)
            set_direct(file, False)
        while done < target.nbytes:
            count = os.preadv(file, [target[done:]], offset + done)
            if not count:
                break
            done += count
        return done
    finally:
        os.close(file)


def read_exactly(path: Path, target: memoryview, offset: int) -> None:
    """Fill a buffer of any size with what a file has from `offset` on, several blocks at once.

    Raises:
        UsageError: The file ends early.
    """
    starts = range(0, target.nbytes, BLOCK)

    def read(start: int) -> int:
        return read_into(path, target[start : start + BLOCK], offset + start)

    if len(starts) <= 1:
        count = sum(map(read, starts))
    else:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            count = sum(pool.map(read, starts))
    if count < target.nbytes:
        raise UsageError(
            f"{path} ends before byte {offset + target.nbytes}", hint="is it still being written?"
        )


def _in_memory(file: int, target: memoryview, offset: int) -> int:
    """Read what the system has in memory from here on, as far as it goes.

    Asking for more than a page of what it does not have makes it read ahead.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return 0
    done, most = 0, PAGE
    with suppress(OSError):  # it has none, or cannot tell
        while done < target.nbytes:
            count = os.preadv(file, [target[done : done + most]], offset + done, os.RWF_NOWAIT)
            if not count:
                break
            done, most = done + count, target.nbytes
    return done


def _direct(file: int, target: memoryview, offset: int) -> int:
    """Read whole pages past the system's memory: to where they are wanted, or copied if that is not at a page."""
    whole = target.nbytes // PAGE * PAGE
    if not offset % PAGE and whole and not ctypes.addressof(ctypes.c_char.from_buffer(target)) % PAGE:
        return os.preadv(file, [target[:whole]], offset)
    if not hasattr(_own, "pages"):
        _own.pages = memoryview(mmap.mmap(-1, BLOCK + 2 * PAGE))
    before = offset % PAGE
    span = -(-(before + target.nbytes) // PAGE) * PAGE
    count = os.preadv(file, [_own.pages[:span]], offset - before) - before
    count = max(0, min(count, target.nbytes))
    target[:count] = _own.pages[before : before + count]
    return count


def blocks(path: Path) -> Iterator[memoryview]:
    """The bytes of a file in order, in blocks that hold until the next is asked for."""
    buffers = [memoryview(mmap.mmap(-1, BLOCK)) for _ in range(AT_ONCE + 1)]
    waiting: deque[tuple[memoryview, Future[int]]] = deque()
    size, at, turn = path.stat().st_size, 0, 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while at < size or waiting:
            while at < size and len(waiting) < AT_ONCE:
                target = buffers[turn][: min(BLOCK, size - at)]
                waiting.append((target, pool.submit(read_into, path, target, at)))
                at, turn = at + target.nbytes, (turn + 1) % len(buffers)
            target, done = waiting.popleft()
            yield target[: done.result()]
