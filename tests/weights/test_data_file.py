"""A data file has the bytes that it was given, and their checksum, whatever their sizes and the file system."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from moe_export.disk import BLOCK, PAGE
from moe_export.errors import UsageError
from moe_export.export.weights.data_file import DataFile

FOLDERS = ["disk", *(["memory"] if os.access("/dev/shm", os.W_OK) else [])]


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path, tmp_path_factory):
    """A folder on the disk, and one of a file system that may have no direct way to it."""
    if request.param == "disk":
        yield tmp_path
        return
    path = Path(f"/dev/shm/{tmp_path_factory.getbasetemp().name}-data-file")
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def bytes_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8).tobytes()


@pytest.mark.parametrize("size", [0, 1, PAGE, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 4097])
def test_bytes_and_checksum(folder, size):
    content = bytes_of(size)
    with DataFile(folder / "f") as file:
        file.write(content)
    assert (folder / "f").read_bytes() == content
    assert file.digest == hashlib.sha256(content).hexdigest()


def test_pieces_and_parts_of_files_behind_each_other(folder):
    source = folder / "source"
    source.write_bytes(bytes_of(3 * BLOCK))
    expected = b""
    with DataFile(folder / "f") as file:
        for number, size in enumerate((5, BLOCK - 7, 2 * BLOCK + 3, 100)):
            at = file.align()
            assert at % PAGE == 0
            expected += b"\0" * (at - len(expected))
            piece = bytes_of(size, number)
            file.write(piece)
            expected += piece
            file.write_from(source, 11 * number, size)
            expected += source.read_bytes()[11 * number :][:size]
    assert (folder / "f").read_bytes() == expected
    assert file.digest == hashlib.sha256(expected).hexdigest()


def test_what_was_given_may_change_at_once(folder):
    piece = bytearray(BLOCK)
    with DataFile(folder / "f") as file:
        for number in range(6):
            piece[:] = bytes([number]) * BLOCK
            file.write(piece)
    assert (folder / "f").read_bytes() == b"".join(bytes([number]) * BLOCK for number in range(6))


def test_a_source_that_ends_early_is_named(folder):
    (folder / "source").write_bytes(b"x" * 10)
    with pytest.raises(UsageError, match=r"source ends before byte 12"), DataFile(folder / "f") as file:
        file.write_from(folder / "source", 2, 10)
    assert file.digest == ""


def test_a_disk_that_refuses_is_told_when_the_file_is_closed(folder):
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full, which refuses every byte")
    with pytest.raises(OSError, match="No space left"), DataFile(Path("/dev/full")) as file:
        file.write(b"x" * (BLOCK + 1))
    assert file.digest == ""
