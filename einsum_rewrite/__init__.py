"""Einsum without `Einsum`: one plan, three ways out.

equation ─▶ notation, equation      what was written: labels and operands
     │
   shapes ─▶ binding                every axis has a label, every label a size
     │
   plan ─▶ planner                  contraction (which pair first), pairwise (multiply or matmul),
     │       │                      layout and orders (how few permutes), prices (which is cheapest)
     │      steps, amount           seven kinds of steps; FLOPs and bytes
     │
     ├─▶ torch_ops                  run it, or write it into a torch.fx graph
     │      └─▶ program             every aten.einsum of an ExportedProgram, reported as Sites
     ├─▶ onnx_ops, reshaping        write it as ONNX operators, with one Reshape where that can be
     │      ├─▶ onnx_writer ─▶ onnx_model   every Einsum of a file (onnx_known, onnx_constants, onnx_types)
     │      └─▶ onnx_numpy ─▶ proof         compute it, and compare: each site is proved as it is written
     ├─▶ python_source              the PyTorch lines a person would write
     └─▶ explain                    what else was weighed, and what people write by hand
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.planner import plan_einsum
from moe_export.einsum_rewrite.python_source import to_python

if TYPE_CHECKING:
    from moe_export.einsum_rewrite.codemod import rewrite_source
    from moe_export.einsum_rewrite.onnx_model import rewrite_onnx
    from moe_export.einsum_rewrite.program import rewrite_program
    from moe_export.einsum_rewrite.sites import Site
    from moe_export.einsum_rewrite.torch_ops import einsum

__all__ = [
    "Equation",
    "Plan",
    "Site",
    "einsum",
    "plan_einsum",
    "rewrite_onnx",
    "rewrite_program",
    "rewrite_source",
    "to_python",
]

# These need torch, which planning does not: they are imported when they are first asked for.
_NEED_TORCH = {
    "einsum": "torch_ops",
    "rewrite_onnx": "onnx_model",
    "rewrite_program": "program",
    "Site": "sites",
    "rewrite_source": "codemod",
}


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
