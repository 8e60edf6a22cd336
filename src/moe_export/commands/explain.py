"""`moe-export explain MX101`: the section of docs/refusals.md on a code, as `rustc --explain` has it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final, Literal, TypedDict

from moe_export.commands.console import Console
from moe_export.errors import Code, UsageError

PAGE = Path(__file__).parent.parent / "refusals.md"
"""docs/refusals.md, as it is installed with the package."""
SCHEMA: Final = "moe-export/explain/1"


class ExplainDocument(TypedDict):
    """What a code means: `moe-export explain --json`."""

    schema: Literal["moe-export/explain/1"]
    code: str
    title: str
    text: str


def run_explain(code: str, console: Console) -> int:
    """Run the command; the exit code: 0.

    Args:
        code: As a message has it, `MX101`, in either case, with or without brackets.
        console: Where it is shown.

    Raises:
        UsageError: There is no such code.
    """
    wanted = code.strip("[]").upper()
    known = {each.number: each for each in Code}
    if wanted not in known:
        codes = "\n".join(f"{each.number}  {each.title}" for each in Code)
        raise UsageError(f"there is no code {code}", hint=f"the codes are\n{codes}")
    found = known[wanted]
    text = section(found)
    document: ExplainDocument = {
        "schema": SCHEMA,
        "code": found.number,
        "title": found.title,
        "text": text,
    }
    console.json(json.dumps(document))
    console.say(f"{found.number}: {found.title}\n\n{text}")
    return 0


def section(code: Code) -> str:
    """What the page says of a code, without its heading and its title."""
    pages = PAGE.read_text(encoding="utf-8")
    match = re.search(
        rf"^## {code.number}\n\*\*{re.escape(code.title)}\.\*\* (?P<text>(?:(?!## ).*\n)*)",
        pages,
        re.MULTILINE,
    )
    assert match is not None, f"docs/refusals.md has no section {code.number}"
    return match["text"].strip()
