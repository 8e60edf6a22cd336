"""A model behind some engine: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from moe_export.errors import MoeExportError
from moe_export.verify.specs import Array


class Runner(Protocol):
    """Anything that `compare` can compare.

    `name` is what reports call it ("torch", "onnxruntime-cpu"). `run` must neither change its inputs nor
    hand out arrays that a later run changes; whatever it raises counts as a refusal of these inputs.
    """

    @property
    def name(self) -> str:
        """What reports call this engine."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once."""
        ...


class RunFailedError(MoeExportError):
    """The engine accepted the inputs and failed while it ran (exit code 1)."""

    exit_code = 1


class NoMemoryError(RunFailedError):
    """The engine ran out of memory, which says nothing about what it computes."""


def one_line(error: BaseException, limit: int = 160) -> str:
    """`ValueError: what it says`, the first line only, at most `limit` characters."""
    text = str(error).strip()
    first = text.splitlines()[0].strip() if text else ""
    name = type(error).__name__
    return shorten(f"{name}: {first}" if first else name, limit)


def shorten(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters with an ellipsis at the end."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
