"""From a user's model file to ONNX graphs.

```
model.py ─▶ load ─▶ fold ─▶ trace ─▶ … ─▶ translate ─▶ … ─▶ serialize
             │        │       │               │
          Subject   Model  Program          Draft        (all stages: `stages.PIPELINE`, docs/architecture.md)
```

Rooms from below: `torch_compat`, `weights`, `frontend`, `axes`, `tracing`, `onnx`, `gates`, `recurrence`,
`experts`, `scans`, `precision`, `engines`. They are put together by `options`, `stages` and `pipeline`, above which
`parallel` makes a graph a rank. docs/architecture.md says what each is for; a file imports none from above it.

Importing a file here imports no other: what only knows ONNX needs no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_export.export.frontend.load import load_subject
    from moe_export.export.frontend.subject import Subject
    from moe_export.export.options import Options
    from moe_export.export.pipeline import Graph, export_subject
    from moe_export.export.tracing.trace import Traced, trace

__all__ = ["Graph", "Options", "Subject", "Traced", "export_subject", "load_subject", "trace"]

# name → the file that defines it; looked up on first use (PEP 562).
_LAZY = {
    "Graph": "pipeline",
    "Options": "options",
    "Subject": "frontend.subject",
    "Traced": "tracing.trace",
    "export_subject": "pipeline",
    "load_subject": "frontend.load",
    "trace": "tracing.trace",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
