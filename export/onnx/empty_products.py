"""`settle_empty_products`: products whose contracted axis may have no elements, in a form that gives zeros then.

    x[:, 1:].transpose(1, 2) @ x[:, 1:]     of one token: a sum of nothing, which is 0

ONNX Runtime (1.31) leaves the result as it finds the memory, but for its first matrix, where an operand is a vector, a
matrix beside a batch of them, or transposed (`FusedMatMul`); with axes in another order it ends in SIGFPE, and so does
its `Einsum`. So a row of zeros is added to both operands if the contracted size can be 0: of a slice of nothing, of a
mask that selects nothing. Of all other products, and of two plain matrices, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from moe_export.domain import evaluate
from moe_export.errors import UsageError
from moe_export.export.onnx.reshapes import Size, is_of_data
from moe_export.export.tracing.trace import Traced
from moe_export.graph_builder import GraphBuilder

_SPELLED = (("Max(", "max("), ("Min(", "min("), ("ceiling(", "ceil("))
_FEW = 17  # sizes of each dimension at which an expression is looked at


def settle_empty_products(model: ir.Model, traced: Traced) -> None:
    """Change every such product of a translated model, in place, those in the bodies of loops included."""
    for node in [*model.graph.all_nodes()]:
        if node.op_type != "MatMul" or node.domain or node.graph is None:
            continue
        left, right = node.inputs
        if left is None or right is None or left.shape is None or right.shape is None:
            continue
        ranks = len(left.shape), len(right.shape)
        axes = ranks[0] - 1, max(ranks[1] - 2, 0)
        if ranks == (2, 2) or not any(
            _may_be_zero(value.shape[axis], traced)
            for value, axis in zip((left, right), axes, strict=True)
            if value.shape is not None
        ):
            continue
        nodes = GraphBuilder.in_front_of(node, f"{node.name or 'product'}_filled")
        for place, (value, rank, axis) in enumerate(zip((left, right), ranks, axes, strict=True)):
            pads = [0] * rank + [int(other == axis) for other in range(rank)]
            node.replace_input_with(place, nodes.op("Pad", value, nodes.ints(*pads)))


def _may_be_zero(size: Size, traced: Traced) -> bool:
    """Whether a size can be 0: a number, or an expression that is 0 within the domain, or one that values decide."""
    if isinstance(size, int):
        return size == 0
    text, symbols = size.value or "", traced.dim_names()
    for before, after in _SPELLED:
        text = text.replace(before, after)
    if text in symbols or not text:
        return False
    if is_of_data(size):
        return True
    try:
        return any(
            traced.domain.holds(sizes)
            and evaluate(text, {symbol: sizes[name] for symbol, name in symbols.items()}) <= 0
            for sizes in _small(traced)
        )
    except UsageError:
        return False


def _small(traced: Traced) -> Iterator[dict[str, int]]:
    """Small sizes of each dimension, beside the least of the others and beside those of the example."""
    for others in (
        {dim.name: dim.minimum for dim in traced.dims},
        {dim.name: dim.traced for dim in traced.dims},
    ):
        for dim in traced.dims:
            for size in range(dim.minimum, dim.minimum + _FEW):
                yield others | {dim.name: size}
