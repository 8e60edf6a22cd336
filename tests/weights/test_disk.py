"""Files are read as they are, wherever a stretch begins and whether the system has them in memory; checksums ahead."""

from __future__ import annotations

import hashlib
import mmap
import os

import numpy as np
import pytest

from moe_export import external_data
from moe_export.disk import BLOCK, PAGE, blocks, read_exactly, read_into
from moe_export.errors import UsageError
from moe_export.external_data import ReadAhead, fingerprint

SIZE = 3 * BLOCK + 777


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()


@pytest.fixture(params=["in memory", "on the disk"])
def file(request, tmp_path, content):
    """A file that the system has in memory, and one that it was told to forget."""
    path = tmp_path / "f"
    path.write_bytes(content)
    if request.param == "on the disk" and hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return path


STRETCHES = [(0, SIZE), (1, 2 * BLOCK), (PAGE, BLOCK), (PAGE, PAGE + 5), (PAGE - 1, 2), (SIZE - 3, 3), (5, 0)]


@pytest.mark.parametrize("at_a_page", [True, False])
@pytest.mark.parametrize(("offset", "size"), STRETCHES)
def test_any_stretch(file, content, offset, size, at_a_page):
    memory = memoryview(mmap.mmap(-1, size + PAGE))
    target = memory[:size] if at_a_page else memory[7 : 7 + size]
    read_exactly(file, target, offset)
    assert bytes(target) == content[offset : offset + size]


def test_the_end_of_a_file(file, content):
    target = bytearray(BLOCK)
    assert read_into(file, memoryview(target), SIZE - 10) == 10
    assert target[:10] == content[-10:]
    assert read_into(file, memoryview(target), SIZE + PAGE) == 0
    with pytest.raises(UsageError, match=f"ends before byte {SIZE + 1}"):
        read_exactly(file, memoryview(bytearray(2 * BLOCK)), SIZE + 1 - 2 * BLOCK)


def test_blocks_in_order(file, content):
    assert b"".join(bytes(block) for block in blocks(file)) == content


def test_an_empty_file_has_no_block(tmp_path):
    (tmp_path / "f").touch()
    assert list(blocks(tmp_path / "f")) == []
    read_exactly(tmp_path / "f", memoryview(b""), 0)


def test_checksums_are_there_when_they_are_asked_for(file, content):
    with ReadAhead() as ahead:
        ahead.read([file, file])
        found = fingerprint(file)
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    assert not external_data._ahead


def test_a_file_that_changes_meanwhile_is_read_again(file):
    with ReadAhead() as ahead:
        ahead.read([file])
        file.write_bytes(b"other")
        assert fingerprint(file)["sha256"] == hashlib.sha256(b"other").hexdigest()


def test_who_leaves_waits_for_no_reading(tmp_path):
    """64 GiB of nothing: what was begun and is not needed any more ends at once."""
    files = [tmp_path / name for name in "abcd"]
    for path in files:
        with path.open("wb") as sparse:
            sparse.truncate(2**34)
    with ReadAhead() as ahead:
        ahead.read(files)
    assert not external_data._ahead
    assert not [key for key in external_data._seen if key[2] == 2**34]
