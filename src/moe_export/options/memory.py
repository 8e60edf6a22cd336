"""Amounts of memory, and sizes of files, as people type them: `4GB`, `512MiB`, `1000000`."""

from __future__ import annotations

import re

from moe_export.errors import UsageError

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_bytes(text: str, option: str) -> int:
    """Bytes.

    Args:
        text: A number, and a unit of 1000 (`MB`) or 1024 (`MiB`).
        option: What it was given to, for the error.

    Raises:
        UsageError: It is no size.

    Example:
        >>> parse_bytes("1.5GB", "--shard-size")
        1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    if match is None or not float(match[1]):
        raise UsageError(f"{option} is a size, not {text!r}", hint="write 4GB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2] or ""])
