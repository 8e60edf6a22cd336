"""`known_truth`: the truth of a traced value that no input has a say in, whatever the sizes are.

    n = x.new_zeros(batch, d)
    if torch.all(n == 0): ...          true
    if self.scale.max() > 1: ...       as the weights have it

The value's nodes are run on small sizes, several of them. It is known where not only the answer is the same at each,
but the least and the greatest element of every value on the way: `torch.ones(n).sum() > 100` has one answer at small
sizes, and another beyond them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from moe_export.export.torch_compat.dispatch import no_modes
from moe_export.export.torch_compat.operators import Effect, effect_of
from moe_export.export.tracing.randomness import may_be_random

_SIZES = (2, 3, 5, 8)  # what each free size is put for, one after the other
_MOST_NODES = 400  # of a value that is worth running
_MOST_ELEMENTS = 2**22
_aten = torch.ops.aten
_LIKE = {
    _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default,
    _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default,
}  # fmt: skip
"""What reads the type and the shape of its first argument, and no value of it."""
_WRITES = {Effect.WRITES, Effect.UNKNOWN}


class _UnknownError(Exception):
    """A value depends on an input, or cannot be run."""


def known_truth(node: fx.Node, weights: Mapping[fx.Node, Any]) -> bool | None:
    """Whether a value is true; None if inputs or sizes decide that.

    Args:
        node: Of the trace under way.
        weights: The values of weights and buffers, by their nodes.
    """
    try:
        order = _needed(node, weights)
        ranges = {tuple(_ranges(order, weights, size)) for size in _SIZES}
    except Exception:
        return None
    found = ranges.pop()
    if ranges or not found:
        return None
    ((least, _),) = found[-1]
    return bool(least)


def _needed(node: fx.Node, weights: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """The nodes that a value is computed by, in order, less those of sizes."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in found or _is_size(each):
            continue
        if each not in weights and (each.op != "call_function" or may_be_random(each)):
            raise _UnknownError
        if len(found) > _MOST_NODES:
            raise _UnknownError
        found[each] = None
        if each not in weights:
            waiting += each.all_input_nodes[1:] if each.target in _LIKE else each.all_input_nodes
    places: dict[fx.Node, int] = {}
    for place, each in enumerate(node.graph.nodes):
        places[each] = place
        if each.op == "call_function" and effect_of(each.target) in _WRITES and _owner(each) in found:
            raise _UnknownError  # its nodes do not say when it is read
    return sorted(found.keys() - weights.keys(), key=places.__getitem__)


def _owner(node: fx.Node) -> fx.Node | None:
    """The value that an operator which writes changes, or one of which it changes a part."""
    while node.op == "call_function" and node.all_input_nodes:
        if node.target is not operator.getitem and effect_of(node.target) is Effect.NONE:
            return node
        node = node.all_input_nodes[0]
    return node


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _ranges(
    order: list[fx.Node], weights: Mapping[fx.Node, Any], size: int
) -> Iterator[tuple[tuple[float, float], ...]]:
    """The least and the greatest element of each tensor that a node gives, node by node."""
    values: dict[fx.Node, Any] = dict(weights)

    def value_of(node: fx.Node) -> Any:
        return _size(node.meta["val"], size) if _is_size(node) else values[node]

    with no_modes(), torch.no_grad():
        for node in order:
            like = (_empty(node.all_input_nodes[0], size),) if node.target in _LIKE else ()
            args, kwargs = fx.map_arg((node.args[len(like) :], node.kwargs), value_of)
            values[node] = node.target(*like, *args, **kwargs)  # type: ignore[operator]
            found = values[node]
            if isinstance(found, torch.Tensor) and found.numel() > _MOST_ELEMENTS:
                raise _UnknownError
            yield tuple(map(_range, found if isinstance(found, (tuple, list)) else (found,)))


def _range(value: Any) -> tuple[float, float]:
    tensor = torch.as_tensor(value)
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    least, greatest = real.to(torch.float64).aminmax()
    return float(least), float(greatest)


def _empty(node: fx.Node, size: int) -> torch.Tensor:
    """A tensor of the type and the shape that a value has at some sizes."""
    value = node.meta["val"]
    shape = [_size(each, size) if isinstance(each, torch.SymInt) else each for each in value.shape]
    return torch.empty(shape, dtype=value.dtype)


def _size(value: torch.SymInt, size: int) -> int:
    expression = value.node.expr
    number = expression.subs(dict.fromkeys(expression.free_symbols, size))
    if not number.is_Integer:
        raise _UnknownError
    return int(number)
