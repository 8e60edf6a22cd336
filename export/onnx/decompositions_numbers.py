"""What Python computes from sizes, decomposed so that the exporter's graph gives the same numbers.

The exporter writes `-(-n // 8)` as a division that rounds towards zero, which is right only for what is not
negative, and has no form for `round`, `n >> 3` and `(n + 7) & -8`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import fx

from moe_export.export.onnx.before import Before


def _floor_division(node: fx.Node) -> None:
    """`a // b` → `(a - a % b) // b`, unless neither can be negative."""
    first, second = node.args
    if _is_integer(node) and not (_is_not_negative(first) and _is_not_negative(second)):
        rest = Before(node)(operator.mod, first, second)
        node.args = (Before(node)(operator.sub, first, rest), second)


def _rounding(node: fx.Node) -> None:
    """`round(x)`: to the nearest integer, halves to the even one. For 2.5 that is 2: both, 2 + 3, halved to even."""
    value = node.args[0]
    if not _is_integer(node) or any(each is not None for each in node.args[1:]):
        return
    low = Before(node)(math.ceil, Before(node)(operator.sub, value, 0.5))
    high = Before(node)(math.floor, Before(node)(operator.add, value, 0.5))
    both = Before(node)(operator.add, low, high)
    odd = Before(node)(operator.mod, both, 2)
    half = Before(node)(operator.floordiv, Before(node)(operator.sub, both, odd), 2)
    up = Before(node)(operator.mul, odd, Before(node)(operator.mod, half, 2))
    node.target, node.args, node.kwargs = operator.add, (half, up), {}


def _bits(node: fx.Node) -> None:
    """`a & -8` → `a - a % 8`, `a & 7` → `a % 8`."""
    first, second = node.args
    if isinstance(first, int):
        first, second = second, first
    if not _is_integer(node) or not isinstance(second, int):
        return
    if second < 0 and _is_power(-second):
        rest = Before(node)(operator.mod, first, -second)
        node.target, node.args = operator.sub, (first, rest)
    elif second >= 0 and _is_power(second + 1):
        node.target, node.args = operator.mod, (first, second + 1)


def _shift_down(node: fx.Node) -> None:
    """`a >> 3` → `a // 8`."""
    if _is_integer(node) and isinstance(node.args[1], int):
        node.target, node.args = operator.floordiv, (node.args[0], 1 << node.args[1])
        _floor_division(node)


def _shift_up(node: fx.Node) -> None:
    """`a << 3` → `a * 8`."""
    if _is_integer(node) and isinstance(node.args[1], int):
        node.target, node.args = operator.mul, (node.args[0], 1 << node.args[1])


def _is_integer(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _is_not_negative(value: object) -> bool:
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt) and not value.node.is_constant():
        return bool(value.node.shape_env.bound_sympy(value.node.expr).lower >= 0)
    return isinstance(value, int | torch.SymInt) and int(value) >= 0


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


NUMBER_RULES: dict[object, Callable[[fx.Node], None]] = {
    operator.floordiv: _floor_division,
    operator.and_: _bits,
    operator.rshift: _shift_down,
    operator.lshift: _shift_up,
    round: _rounding,
}
