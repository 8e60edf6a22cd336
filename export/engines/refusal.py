"""`Refusal`: one thing that TensorRT refuses, in the words of the model: node, module, source line, way out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from moe_export.errors import Code, NotExportableError
from moe_export.export.engines.module import FULL, RTX
from moe_export.export.onnx.provenance import MODULE, SOURCE

_SHOWN = 8
ALWAYS_FINE = (0, 0)
"""What only TensorRT-RTX refuses."""


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
        lifted: The version of full TensorRT from which on it does not refuse this, `(11, 2)`; `ALWAYS_FINE` if none
            refused it; None if all do. TensorRT-RTX refuses it in any case.
    """

    rule: str
    node: str = ""
    module: str = ""
    source: str = ""
    hint: str = ""
    capability: str = ""
    lifted: tuple[int, int] | None = None

    @property
    def builder(self) -> str:
        """Which TensorRT refuses it, where that is not both: `tensorrt-rtx, and tensorrt before 11.2`."""
        if self.lifted is None:
            return ""
        return (
            RTX
            if self.lifted == ALWAYS_FINE
            else f"{RTX}, and {FULL} before {'.'.join(map(str, self.lifted))}"
        )

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


def refusal_at(
    node: ir.Node | None,
    rule: str,
    hint: str = "",
    capability: str = "",
    lifted: tuple[int, int] | None = None,
) -> Refusal:
    """A refusal of one node, with what its metadata says of where it comes from."""
    if node is None:
        return Refusal(rule, hint=hint, capability=capability, lifted=lifted)
    kind = node.op_type if node.domain in {"", "ai.onnx"} else f"{node.domain}.{node.op_type}"
    name = node.name or (node.outputs[0].name if node.outputs else "") or ""
    props = node.metadata_props
    where = f"{kind} {name}".strip()
    return Refusal(rule, where, props.get(MODULE, ""), props.get(SOURCE, ""), hint, capability, lifted)


def refused(refusals: tuple[Refusal, ...], what: str) -> NotExportableError:
    """The error for a graph that TensorRT refuses: every refusal with its place, and the options that avoid them."""
    lines = [str(refusal) for refusal in refusals[:_SHOWN]]
    if len(refusals) > _SHOWN:
        lines.append(f"... and {len(refusals) - _SHOWN} more")
    hints = dict.fromkeys(refusal.hint for refusal in refusals if refusal.hint)
    return NotExportableError(what, code=Code.ENGINE, where="\n".join(lines), hint="\n".join(hints) or None)
