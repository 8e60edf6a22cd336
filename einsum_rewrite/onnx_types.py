"""In which type an einsum is computed where ONNX or an engine lacks it in the type of its operands.

    Einsum                                 int8 ... uint64, float16, float, double; bfloat16 from opset 28
    MatMul, Mul, ReduceSum                 int32, int64, uint32, uint64, the floats; bfloat16 from opset 13
    Mul                                    int8, int16, uint8, uint16 from opset 14
    ONNX Runtime on a CPU                  no arithmetic in bfloat16, no ReduceSum of unsigned integers

Small integers wrap around on the way back as they would have on the way.
"""

from __future__ import annotations

import onnx_ir as ir

from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.steps import Multiply, Sum
from moe_export.errors import EquationError

_SMALL = {ir.DataType.INT8, ir.DataType.INT16, ir.DataType.UINT8, ir.DataType.UINT16}
_WIDE_UNSIGNED = {ir.DataType.UINT32: ir.DataType.INT64, ir.DataType.UINT64: ir.DataType.INT64}
_NEVER = {ir.DataType.BOOL, ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128}


def computing_type(plan: Plan, dtype: ir.DataType | None, opset: int, target: str) -> ir.DataType | None:
    """The type to cast to before the steps and back from behind them; None if nothing need be cast.

    Args:
        plan: What is computed; a plan that only moves data has an operator for every type.
        dtype: The type of the operands, None if it is not known (then it is taken to be a plain float).
        opset: The opset of the graph.
        target: The engine (see `targets`).

    Raises:
        EquationError: No operator of this opset takes the type.
    """
    if dtype in _NEVER:
        raise EquationError(f"ONNX has no einsum of {dtype.name.lower()}", where=plan.equation.text)
    if dtype == ir.DataType.BFLOAT16 and opset < 13:
        raise EquationError(
            f"opset {opset} has no operator for bfloat16, not even Cast",
            where=plan.equation.text,
            hint="convert the model to opset 13 or newer",
        )
    kinds = {type(step.action) for step in plan.steps if step.computes}
    if dtype is None or not kinds:
        return None
    on_cpu = target == "onnxruntime-cpu"
    if dtype == ir.DataType.BFLOAT16 and on_cpu:
        return ir.DataType.FLOAT
    if dtype in _SMALL and (opset < 14 or kinds != {Multiply}):
        return ir.DataType.INT32
    if dtype in _WIDE_UNSIGNED and on_cpu and Sum in kinds:
        return _WIDE_UNSIGNED[dtype]
    return None
