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
         └─▶ python_source              the PyTorch lines a person would write
"""

from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.planner import plan_einsum

__all__ = ["Equation", "Plan", "plan_einsum"]
