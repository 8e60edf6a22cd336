"""Sizes of dimensions as people type them: `sequence=100`, `batch=1,sequence=4096`."""

from __future__ import annotations

from collections.abc import Sequence

from moe_export.errors import UsageError


def parse_sizes(text: str) -> dict[str, int]:
    """The size of each dimension that is named.

    Raises:
        UsageError: It is not of that form, or names a dimension twice.

    Example:
        >>> parse_sizes("batch=1,sequence=4096")
        {'batch': 1, 'sequence': 4096}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not size.isdecimal():
            raise UsageError(
                f"--size {text!r} is not DIM=SIZE,...", hint="for example: --size batch=1,sequence=4096"
            )
        if name in sizes:
            raise UsageError(
                f"--size {text!r} gives {name} two sizes", hint="one --size for each set of sizes"
            )
        sizes[name] = int(size)
    return sizes


def parse_one_set(texts: Sequence[str]) -> dict[str, int]:
    """The sizes of a command that takes one set of them.

    Raises:
        UsageError: There are several, or one cannot be read.
    """
    if len(texts) > 1:
        raise UsageError("--size takes all sizes at once here", hint=f"--size {','.join(texts)}")
    return parse_sizes(texts[0]) if texts else {}
