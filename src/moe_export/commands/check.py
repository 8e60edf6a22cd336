"""`moe-export check graph.onnx`: what TensorRT is known to refuse, without building."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final, Literal, TypedDict, cast

from moe_export.commands.console import Console
from moe_export.export.engines.graph_file import read_graph
from moe_export.export.engines.refusal import Refusal
from moe_export.export.engines.rules import Findings, find_refusals

SCHEMA: Final = "moe-export/check/1"
NOTHING = "nothing that TensorRT is known to refuse; only a build (moe-export build) shows that it builds"


class RefusalEntry(TypedDict, total=False):
    """One thing that TensorRT refuses; what is not known of it is left out."""

    rule: str
    node: str
    module: str
    source: str
    hint: str
    capability: str
    builder: str


class CheckDocument(TypedDict):
    """What TensorRT is known to refuse in a graph: `moe-export check --json`."""

    schema: Literal["moe-export/check/1"]
    graph: str
    target: str
    builder: str
    verdict: str
    refused: list[RefusalEntry]
    doubts: list[RefusalEntry]


def run_check(graph: str, builder: str | None, console: Console) -> int:
    """Run the command; the exit code: 1 if something is refused."""
    model, _ = read_graph(graph)
    findings = find_refusals(model, builder)
    console.json(json.dumps(_document(graph, builder, findings), indent=2))
    if not findings.refused:
        console.say(f"{graph}: {NOTHING}")
    else:
        console.say(f"{graph}: {_count(len(findings.refused), 'thing')} that TensorRT refuses")
        _print(console, findings.refused)
    if findings.doubts:
        console.say("\nmay be refused, or compute something else:")
        _print(console, findings.doubts)
    return 1 if findings.refused else 0


def _print(console: Console, refusals: Sequence[Refusal]) -> None:
    """A line for each rule and place; nodes that differ in nothing else are counted."""
    groups: dict[tuple[str, str, str, str], list[Refusal]] = {}
    for refusal in refusals:
        said = not refusal.builder or "TensorRT-RTX" in refusal.rule
        rule = refusal.rule if said else f"{refusal.rule} ({refusal.builder})"
        groups.setdefault((rule, refusal.source, refusal.module, refusal.hint), []).append(refusal)
    for (rule, _, _, hint), group in groups.items():
        more = f" (and {_count(len(group) - 1, 'node')} more there)" if len(group) > 1 else ""
        console.say(f"  {group[0].place}{more}: {rule}")
        if hint:
            console.say(f"      avoid it: {hint}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _document(graph: str, builder: str | None, findings: Findings) -> CheckDocument:
    return {
        "schema": SCHEMA,
        "graph": graph,
        "target": "tensorrt",
        "builder": builder or "tensorrt-rtx, tensorrt",
        "verdict": "refused" if findings.refused else "nothing known is refused; not built",
        "refused": [_facts(refusal) for refusal in findings.refused],
        "doubts": [_facts(refusal) for refusal in findings.doubts],
    }


def _facts(refusal: Refusal) -> RefusalEntry:
    found = {**asdict(refusal), "builder": refusal.builder}
    return cast(
        RefusalEntry, {name: str(value) for name, value in found.items() if value and name != "lifted"}
    )
