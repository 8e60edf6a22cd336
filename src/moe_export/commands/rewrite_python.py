"""`moe-export rewrite model.py`: replace the einsums in Python source; `--check` for pre-commit."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from moe_export.commands.console import Console
from moe_export.einsum_rewrite.codemod import LeftAlone, Rewritten, SourceResult, rewrite_file
from moe_export.errors import UsageError
from moe_export.own_files import put_text


class RewriteDocument(TypedDict):
    """The einsums of a Python file: `moe-export rewrite FILE.py --json`."""

    schema: Literal["moe-export/rewrite-source/1"]
    file: str
    rewritten: Annotated[list[dict[str, Any]], list[Rewritten]]
    left: Annotated[list[dict[str, Any]], list[LeftAlone]]


def run_rewrite_python(
    source: str,
    output: str | None,
    diff: bool,
    in_place: bool,
    check: bool,
    force: bool,
    console: Console,
    alone: bool,
) -> int:
    """Run the command; the exit code: 1 if `--check` finds something to rewrite."""
    chosen = [bool(output), diff, in_place, check]
    if sum(chosen) != 1:
        raise UsageError(
            "choose what to do with the rewritten source",
            where=source,
            hint="one of: -o FILE, --in-place, --diff, --check",
        )
    path = Path(source)
    before = _read(path)
    result = rewrite_file(before, source)
    if output or in_place:
        put_text(Path(output or source), result.code, inputs=[path], force=force or in_place)
    if diff:
        _print_diff(before, result.code, source, console)
    console.json(json.dumps(_document(source, result), indent=2))
    if not diff and (alone or result.rewritten or result.left):
        _say(source, result, "to rewrite" if check else "rewritten", console)
    return 1 if check and result.rewritten else 0


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as Python source: {error}") from None


def _print_diff(before: str, after: str, source: str, console: Console) -> None:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{source}", f"b/{source}"
    )
    console.say("".join(lines).rstrip("\n"))


def _say(source: str, result: SourceResult, done: str, console: Console) -> None:
    for item in result.rewritten:
        console.say(f"{source}:{item.line}: {done}: {item.equation!r} → {item.code}")
    for left in result.left:
        console.say(f"{source}:{left.line}: left alone: {left.reason}")
    console.say(f"{len(result.rewritten)} {done}, {len(result.left)} left alone")


def _document(source: str, result: SourceResult) -> RewriteDocument:
    return {
        "schema": "moe-export/rewrite-source/1",
        "file": source,
        "rewritten": [asdict(item) for item in result.rewritten],
        "left": [asdict(item) for item in result.left],
    }
