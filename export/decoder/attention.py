"""`keyed`: the operands of a product that all tokens look at: keys, where it takes queries, and values.

    scores[.., l, l'] = q[.., l, d] k[.., d, l']          k
    y[.., l, d] = p[.., l, l'] v[.., l', d]               v

Which axes are time shows it: scores have two of them, and neither operand has; what they are multiplied with has one.

Letters: l length, l' length of what is looked at, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def keyed(
    node: fx.Node, times: Callable[[Any], list[int]], rank: Callable[[fx.Node], int]
) -> list[tuple[int, int]]:
    """The operands of a node that all tokens look at, by their places, and for each its axis of time.

    Args:
        node: Any call.
        times: The axes of a value that are as long as there are tokens.
        rank: How many axes a value has.
    """
    if node.target is aten.scaled_dot_product_attention.default:
        return [(place, rank(node.args[place]) - 2) for place in (1, 2) if times(node.args[place])]  # type: ignore[arg-type]
    if node.target in _PRODUCTS:
        left, right = node.args
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        rows, columns = rank(left) - 2, rank(right) - 1
        if times(left) == [rows] and times(right) == [columns]:
            return [(1, columns)]
        if times(left) == [rows, rows + 1] and times(right) == [columns - 1]:
            return [(1, columns - 1)]
    if node.target is aten.einsum.default:
        return _of_einsum(node, times)
    return []


def _of_einsum(node: fx.Node, times: Callable[[Any], list[int]]) -> list[tuple[int, int]]:
    """An einsum of two operands: of scores the second, else the one with a single time, which the other has, too."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    terms, _, out = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    if len(letters) != 2 or "." in equation or not out:
        return []
    time = [[letters[place][axis] for axis in times(operands[place])] for place in (0, 1)]
    if [len(each) for each in time] == [1, 1] and time[0] != time[1] and {*time[0], *time[1]} <= set(out):
        return [(1, letters[1].index(time[1][0]))]
    for place, other in ((0, 1), (1, 0)):
        if len(time[place]) == 1 and len(time[other]) == 2 and time[place][0] in set(time[other]) - set(out):
            return [(place, letters[place].index(time[place][0]))]
    return []


def permuted(node: fx.Node, axis: int, rank: int) -> tuple[fx.Node, int] | None:
    """What a node is a permutation of, and where an axis of it is there; None of any other node.

    Args:
        node: Any node.
        axis: Of its value.
        rank: How many axes its value has.
    """
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is aten.transpose.int:
        one, other = (int(place) % rank for place in node.args[1:3])  # type: ignore[arg-type]
        return source, {one: other, other: one}.get(axis, axis)
    if node.target is aten.permute.default:
        return source, int(node.args[1][axis]) % rank  # type: ignore[index, arg-type]
    return (source, axis) if node.target in (aten.contiguous.default, aten.clone.default) else None
