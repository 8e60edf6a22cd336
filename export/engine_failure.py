"""What TensorRT says when it refuses a graph, in the words of the model: node, module, source line, rule, way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from moe_export.errors import NotExportableError
from moe_export.export.engine_module import errors_in
from moe_export.export.provenance import MODULE, SOURCE

_QUOTED = re.compile(r"'([^']+)'|\"([^\"]+)\"|\{([^{}]+)\}|(?<=[:\s])([\w./]+)(?=[\s:(,.\]])")
_SHOWN = 8
_NOISE = re.compile(r" In \w+ at \S+:\d+|\(In \w+ at \S+:\d+ ?|/_src/\S+")


@dataclass(frozen=True)
class Refusal:
    """One thing that TensorRT refuses.

    Attributes:
        rule: What it refuses, one sentence.
        node: The ONNX node, `NonZero node_nonzero`; empty if it is not known.
        module: Path of the PyTorch module that the node comes from; empty if the graph does not say.
        source: `file.py:line` of the model; empty if the graph does not say.
        hint: Which option avoids it; empty if there is none.
        capability: The one that it is about, `sm75`; empty for all.
    """

    rule: str
    node: str = ""
    module: str = ""
    source: str = ""
    hint: str = ""
    capability: str = ""

    @property
    def place(self) -> str:
        """`node NonZero node_nonzero, model.py:12, module experts.3`, as far as it is known."""
        parts = [
            f"node {self.node}" if self.node else "",
            self.source,
            self.module and f"module {self.module}",
        ]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        start = f"{self.place}: " if self.place else ""
        return f"{start}{self.rule}" + (f" [{self.capability}]" if self.capability else "")


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node: of the graph, of the bodies of If, Loop and Scan, and of functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def refusal_at(node: ir.Node | None, rule: str, hint: str = "", capability: str = "") -> Refusal:
    """A refusal of one node, with what its metadata says of where it comes from."""
    if node is None:
        return Refusal(rule, hint=hint, capability=capability)
    kind = node.op_type if node.domain in {"", "ai.onnx"} else f"{node.domain}.{node.op_type}"
    name = node.name or (node.outputs[0].name if node.outputs else "") or ""
    props = node.metadata_props
    return Refusal(
        rule, f"{kind} {name}".strip(), props.get(MODULE, ""), props.get(SOURCE, ""), hint, capability
    )


def parse_refusals(parser: Any, model: ir.Model) -> tuple[Refusal, ...]:
    """What a parser refused, node by node."""
    named = _by_name(model)
    main = list(model.graph)
    found: dict[Refusal, None] = {}
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = named.get(error.node_name())
        number = error.node()
        if node is None and 0 <= number < len(main) and main[number].op_type == error.node_operator():
            node = main[number]
        found[refusal_at(node, f"TensorRT's parser: {_clean(error.desc())}")] = None
    return tuple(found)


def build_refusals(log: Any, model: ir.Model, capability: str) -> tuple[Refusal, ...]:
    """What a builder said when it made no engine, each with the node that it names."""
    named = _by_name(model)
    texts = errors_in(log) or ["it made no engine and gave no reason"]
    return tuple(
        refusal_at(_node_named_in(text, named), f"TensorRT's builder: {_clean(text)}", capability=capability)
        for text in texts
    )


def _by_name(model: ir.Model) -> Mapping[str, ir.Node]:
    return {node.name: node for node in all_nodes(model) if node.name}


def _node_named_in(text: str, named: Mapping[str, ir.Node]) -> ir.Node | None:
    for match in _QUOTED.finditer(text):
        word = next(group for group in match.groups() if group)
        if word in named:
            return named[word]
    return None


def _clean(text: str) -> str:
    """A message without the places in TensorRT's own source."""
    return re.sub(r"\s+", " ", _NOISE.sub("", text)).strip()


def refused(refusals: tuple[Refusal, ...], what: str) -> NotExportableError:
    """The error for a graph that TensorRT refuses: every refusal with its place, and the options that avoid them."""
    lines = [str(refusal) for refusal in refusals[:_SHOWN]]
    if len(refusals) > _SHOWN:
        lines.append(f"... and {len(refusals) - _SHOWN} more")
    hints = dict.fromkeys(refusal.hint for refusal in refusals if refusal.hint)
    return NotExportableError(what, where="\n".join(lines), hint="\n".join(hints) or None)
