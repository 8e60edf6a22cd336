"""`moe-export schema NAME`: the JSON Schema of a file or of what a command prints with `--json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from moe_export.commands.console import Console
from moe_export.errors import UsageError
from moe_export.reports.json_schema import json_schema

DOCUMENTS: Mapping[str, tuple[str, str]] = {
    "report": ("moe_export.commands.export_document", "ExportDocument"),
    "verify": ("moe_export.commands.verify_document", "VerifyDocument"),
    "verify-several": ("moe_export.commands.verify_document", "SeveralDocument"),
    "engines": ("moe_export.commands.build", "EnginesDocument"),
    "parallel": ("moe_export.export.parallel.manifest", "ManifestDocument"),
    "bench": ("moe_export.commands.bench", "BenchDocument"),
    "check": ("moe_export.commands.check", "CheckDocument"),
    "diff": ("moe_export.commands.diff", "DiffDocument"),
    "explain": ("moe_export.commands.explain", "ExplainDocument"),
    "generate": ("moe_export.commands.generate", "TextDocument"),
    "mutate": ("moe_export.commands.mutate", "MutationDocument"),
    "rewrite": ("moe_export.commands.rewrite_python", "RewriteDocument"),
    "plan": ("moe_export.commands.plan", "PlanDocument"),
}
"""The type of each document that has a `schema`: its module and its name, as the commands import what they need."""


def run_schema(name: str, console: Console) -> int:
    """Run the command; the exit code: 0.

    Args:
        name: Of a document.
        console: Where it is shown.

    Raises:
        UsageError: There is no such document.
    """
    if name not in DOCUMENTS:
        close = get_close_matches(name, DOCUMENTS, n=1)
        raise UsageError(
            f"there is no document {name}" + (f", did you mean {close[0]}?" if close else ""),
            hint=f"the documents are: {', '.join(DOCUMENTS)}",
        )
    text = json.dumps(json_schema(document(name)), indent=2)
    console.json(text)
    console.say(text)
    return 0


def document(name: str) -> Any:
    """The type of a document."""
    module, kind = DOCUMENTS[name]
    return getattr(import_module(module), kind)
