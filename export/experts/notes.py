"""Notes on why code of experts stays as it was written: each names its line, and the value at fault with its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from moe_export.errors import Code
from moe_export.export.axes.choice import is_part
from moe_export.export.frontend.source import line_of


@dataclass(frozen=True)
class Notes:
    """The notes on one program.

    Attributes:
        texts: The notes.
        lines: `file:line` of the code that they are about.
    """

    texts: list[str] = field(default_factory=list)
    lines: set[str | None] = field(default_factory=set)

    def stays(self, what: str, line: str | None, why: str) -> None:
        """Note that code stays as it was written."""
        self._add(line, f"the {what} experts at {line} stays as it was written: {why}")

    def stay_products(self, line: str | None, why: str) -> None:
        """Note the same of masks with a capacity."""
        self._add(line, f"the masks of the experts at {line} stay products, as they were written: {why}")

    def _add(self, line: str | None, text: str) -> None:
        self.lines.add(line)
        self.texts.append(Code.EXPERTS.mark(text))


def named(node: fx.Node) -> str:
    """What computes a value, for a note: its operator and the user's line; an input by its name."""
    node = node.args[0] if is_part(node) and isinstance(node.args[0], fx.Node) else node
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", None) or node.name
    line = line_of(node.meta.get("stack_trace"))
    return f"`{name}` at {line}" if line else f"`{name}`"
