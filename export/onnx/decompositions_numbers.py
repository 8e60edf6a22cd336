"""What Python computes from sizes, decomposed so that the exporter's graph gives the same numbers.

The exporter writes `-(-n // 8)` as a division that rounds towards zero, which is right only for what is not
negative, and has no form for `round`, `n >> 3` and `(n + 7) & -8`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx


def _floor_division(node: fx.Node) -> None:
    """`a // b` → `(a - a % b) // b`, unless neither can be negative."""
    first, second = node.args
    if _is_integer(node) and not (_is_not_negative(first) and _is_not_negative(second)):
        rest = _before(node, operator.mod, first, second)
        node.args = (_before(node, operator.sub, first, rest), second)


def _rounding(node: fx.Node) -> None:
    """`round(x)`: to the nearest integer, halves to the even one. For 2.5 that is 2: both, 2 + 3, halved to even."""
    value = node.args[0]
    if not _is_integer(node) or any(each is not None for each in node.args[1:]):
        return
    low = _before(node, math.ceil, _before(node, operator.sub, value, 0.5))
    high = _before(node, math.floor, _before(node, operator.add, value, 0.5))
    both = _before(node, operator.add, low, high)
    odd = _before(node, operator.mod, both, 2)
    half = _before(node, operator.floordiv, _before(node, operator.sub, both, odd), 2)
    up = _before(node, operator.mul, odd, _before(node, operator.mod, half, 2))
    node.target, node.args, node.kwargs = operator.add, (half, up), {}


def _bits(node: fx.Node) -> None:
    """`a & -8` → `a - a % 8`, `a & 7` → `a % 8`."""
    first, second = node.args
    if isinstance(first, int):
        first, second = second, first
    if not _is_integer(node) or not isinstance(second, int):
        return
    if second < 0 and _is_power(-second):
        rest = _before(node, operator.mod, first, -second)
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


def _before(node: fx.Node, target: Callable[..., Any], *args: fx.node.Argument) -> fx.Node:
    """One more node in front of one, of the same line."""
    assert node.graph is not None
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, args)
    value = target(*fx.map_arg(args, lambda argument: argument.meta["val"]))
    made.meta.update({**node.meta, "val": value})  # a program is refused that has a node without
    return made


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
