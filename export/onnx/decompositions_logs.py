"""Logarithms and exponentials whose forms in the exporter give infinity, or lose all digits, where PyTorch does not.

    logsigmoid(x)     log(sigmoid(x)), -inf below -88      → -softplus(-x)
    logaddexp(a, b)   log(exp(a) + exp(b)), inf above 88   → logsumexp of both
    expm1(x)          exp(x) - 1, 0 below 6e-8             → 2 t / (1 - t) of t = tanh(x / 2), near 0

A gate that is closed far enough (`exp(logsigmoid(x) / 16)`) would be shut for good.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from moe_export.export.axes.shapes import shape_of
from moe_export.export.onnx.before import Before
from moe_export.export.sizes import same_shape

_aten = torch.ops.aten

_NEAR = 0.5


def _log_sigmoid(node: fx.Node) -> None:
    value = node.args[0]
    before = Before(node)
    positive = before(_aten.softplus.default, before(_aten.neg.default, value))
    node.target, node.args, node.kwargs = _aten.neg.default, (positive,), {}


def _log_add_exp(node: fx.Node) -> None:
    first, second = node.args
    before = Before(node)
    if not same_shape(
        shape_of(first), shape_of(second)
    ):  # a zero of the other's shape: infinities stay what they are
        first, second = (
            before(_aten.add.Tensor, value, before(_aten.zeros_like.default, other))
            for value, other in ((first, second), (second, first))
        )
    both = before(_aten.stack.default, [first, second])
    node.target, node.args, node.kwargs = _aten.logsumexp.default, (both, [0]), {}


def _exp_minus_one(node: fx.Node) -> None:
    value = node.args[0]
    before = Before(node)
    half = before(_aten.tanh.default, before(_aten.mul.Scalar, value, 0.5))
    near = before(
        _aten.div.Tensor,
        before(_aten.mul.Scalar, half, 2.0),
        before(_aten.rsub.Scalar, half, 1.0),
    )
    far = before(_aten.sub.Scalar, before(_aten.exp.default, value), 1.0)
    is_near = before(_aten.lt.Scalar, before(_aten.abs.default, value), _NEAR)
    node.target, node.args, node.kwargs = _aten.where.self, (is_near, near, far), {}


LOG_RULES: dict[object, Callable[[fx.Node], None]] = {
    _aten.log_sigmoid.default: _log_sigmoid,
    _aten.logaddexp.default: _log_add_exp,
    _aten.expm1.default: _exp_minus_one,
}
