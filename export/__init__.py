"""From a user's model file to ONNX graphs.

```
model.py ─▶ load ─▶ fold ─▶ trace ─▶ … ─▶ translate ─▶ … ─▶ write
             │        │       │               │
          Subject   Model  Program          Draft        (all stages: `stages.PIPELINE`, docs/architecture.md)
```

| file | what it does |
|---|---|
| `stages`, `options` | the way of a model as a tuple of stages, and what the user may choose of it |
| `pipeline` | the model, its gates and its step, each by the stages |

| room | what it does |
|---|---|
| `torch_compat/` | what PyTorch does not promise: every private name and every patch, each with a canary |
| `frontend/` | what a user brings becomes a `Subject`: by name, by class, or by the first call of a script |
| `axes/` | what the axes of values run over: tokens, choices, experts |
| `tracing/` | `torch.export`, dimensions free where that holds; for which sizes a trace holds |
| `onnx/` | ONNX by the exporter, exactly the opset asked for; names, functions; files, whole or none |
| `gates/` | recognise gates in the traced graph by what they do, cut one out, draw where its tokens go |
| `experts/` | MoE blocks found, understood and lowered ([docs/experts.md](../docs/experts.md)) |
| `recurrence/` | Python loops over time found in a trace and folded ([docs/recurrence.md](../docs/recurrence.md)) |
| `scans/` | folded loops as `Scan`s, or as products over chunks |
| `adapters/` | libraries whose idioms no trace shows |
| `precision/` | half precision ([docs/precision.md](../docs/precision.md)) |
| `weights/` | weights that never fill the memory ([docs/weights.md](../docs/weights.md)) |
| `parallel/` | a graph a rank ([docs/parallel.md](../docs/parallel.md)) |
| `engines/` | TensorRT engines ([docs/engines.md](../docs/engines.md)) |

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
