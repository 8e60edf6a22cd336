"""Distances between rows, and triangular systems.

cdist(a, b)              the norms of all differences; for p = 2 and more than 25 rows by a² - 2ab + b², as PyTorch
has them
solve_triangular(a, b)   by the inverse of a, put together of blocks of 1, 2, 4, ... rows:
(A 0)⁻¹   ( A⁻¹         0  )
(C D)   = (-D⁻¹ C A⁻¹  D⁻¹)
A sum of powers of a - 1 takes as many products and loses all digits where the powers grow,
as they do in a delta rule whose keys are alike
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from moe_export.export.onnx.before import Before, arguments

_aten = torch.ops.aten

_MANY = 25  # rows from which on PyTorch computes distances by a product


def _distances(node: fx.Node) -> None:
    first, second, p, mode = arguments(node, None, None, 2.0, None)
    before = Before(node)
    rows = [each.meta["val"].shape[-2] for each in (first, second)]
    by_product = mode != 2 and any(isinstance(each, int) and each > _MANY for each in rows)
    if p == 2 and (by_product or mode == 1):
        node.target, node.args = _aten.sqrt.default, (_by_product(before, first, second),)
        return
    apart = before(
        _aten.sub.Tensor,
        before(_aten.unsqueeze.default, first, -2),
        before(_aten.unsqueeze.default, second, -3),
    )
    node.target, node.args = _aten.linalg_vector_norm.default, (apart, p, [-1])


def _by_product(before: Before, first: fx.Node, second: fx.Node) -> fx.Node:
    """(..., P, R) of squares, none below 0."""
    squares = [
        before(_aten.sum.dim_IntList, before(_aten.mul.Tensor, each, each), [-1]) for each in (first, second)
    ]
    product = before(_aten.matmul.default, first, before(_aten.transpose.int, second, -2, -1))
    both = before(
        _aten.add.Tensor,
        before(_aten.unsqueeze.default, squares[0], -1),
        before(_aten.unsqueeze.default, squares[1], -2),
    )
    square = before(_aten.sub.Tensor, both, before(_aten.mul.Scalar, product, 2.0))
    return before(_aten.clamp.default, square, 0.0)


def _solve(node: fx.Node) -> None:
    """X = A⁻¹ b, and what that leaves of b is solved once more: it then has the digits of a substitution."""
    matrix, right = arguments(node)
    upper, left = bool(node.kwargs["upper"]), bool(node.kwargs.get("left", True))
    size = matrix.meta["val"].shape[-1]
    if not isinstance(size, int) or not size:
        return
    before = Before(node)
    lower = before(_aten.transpose.int, matrix, -2, -1) if upper else matrix
    lower, inverse = _triangle(before, lower, size, bool(node.kwargs.get("unitriangular", False)))
    if upper:
        lower, inverse = (before(_aten.transpose.int, each, -2, -1) for each in (lower, inverse))

    def times(factor: fx.Node, sides: fx.Node) -> fx.Node:
        return before(_aten.matmul.default, *((factor, sides) if left else (sides, factor)))

    found = times(inverse, right)
    rest = before(_aten.sub.Tensor, right, times(lower, found))
    node.target, node.args, node.kwargs = _aten.add.Tensor, (found, times(inverse, rest)), {}


def _triangle(before: Before, matrix: fx.Node, size: int, ones: bool) -> tuple[fx.Node, fx.Node]:
    """The lower triangle (..., size, size) of a matrix, with ones on its diagonal if that is asked for; its inverse.

    With X the inverse of the blocks of s rows, and C what stands left of each second one of them, X - X C X is that of
    the blocks of 2 s rows.
    """
    place = before(_aten.arange.default, size)
    rows, columns = before(_aten.unsqueeze.default, place, -1), before(_aten.unsqueeze.default, place, 0)
    one, zero = (before(kind, matrix) for kind in (_aten.ones_like.default, _aten.zeros_like.default))
    on_it = before(_aten.eq.Tensor, rows, columns)
    lower = before(_aten.where.self, before(_aten.ge.Tensor, rows, columns), matrix, zero)
    lower = before(_aten.where.self, on_it, one, lower) if ones else lower
    inverse = before(_aten.where.self, on_it, one if ones else before(_aten.reciprocal.default, matrix), zero)
    block = 1
    while block < size:
        row, column = (
            before(_aten.div.Tensor_mode, each, block, rounding_mode="floor") for each in (rows, columns)
        )
        second = before(_aten.eq.Scalar, before(_aten.remainder.Scalar, row, 2), 1)
        beside = before(_aten.eq.Tensor, before(_aten.sub.Scalar, row, 1), column)
        left = before(_aten.where.self, before(_aten.logical_and.default, second, beside), lower, zero)
        change = before(_aten.matmul.default, before(_aten.matmul.default, inverse, left), inverse)
        inverse = before(_aten.sub.Tensor, inverse, change)
        block *= 2
    return lower, inverse


MATRIX_RULES: dict[object, Callable[[fx.Node], None]] = {
    _aten.cdist.default: _distances,
    _aten.linalg_solve_triangular.default: _solve,
}
