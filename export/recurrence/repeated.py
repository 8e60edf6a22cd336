"""`indexed_anew`: a value that a loop computes anew in every iteration, each time the same, to read a different place.

for t in range(L):                       x.unsqueeze(2) is one value, computed before the loop;
    h = h + x[:, :, None, t]             iteration t reads its place t
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moe_export.export.recurrence.period import LEAST_ITERATIONS
from moe_export.export.tracing.randomness import may_be_random

aten = torch.ops.aten
_PLACES = (aten.select.int, aten.slice.Tensor, aten.unbind.int)


def indexed_anew(nodes: Sequence[fx.Node]) -> Mapping[fx.Node, int]:
    """Nodes that compute the same value as at least two others, to read a place of it; with a number for the value.

    Args:
        nodes: The nodes of a graph in which nothing is changed in place.
    """
    values = _values(nodes)
    times = Counter(values.values())
    again = {node for node, value in values.items() if times[value] >= LEAST_ITERATIONS}
    found = set[fx.Node]()
    for node in reversed(nodes):
        if node in again and any(user.target in _PLACES or user in found for user in node.users):
            found.add(node)
    wanted = {values[node] for node in found}  # also of iterations that read the value in another way
    return {node: value for node, value in values.items() if value in wanted}


def _values(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """A number for the value of each computation (value numbering): equal for one operator on equal values."""
    numbers: dict[Any, int] = {}
    values: dict[fx.Node, int] = {}
    for node in nodes:
        key: Any = node
        if node.op == "call_function" and node.all_input_nodes and not may_be_random(node):
            key = (node.target, *(_named(argument, values) for argument in (node.args, node.kwargs)))
        values[node] = numbers.setdefault(key, len(numbers))
    return {
        node: value
        for node, value in values.items()
        if node.op == "call_function" and node.target not in _PLACES and node.all_input_nodes
    }


def _named(argument: Any, values: Mapping[fx.Node, int]) -> Any:
    """Nested arguments as hashable data, each node by the number of its value."""
    if isinstance(argument, fx.Node):
        return f"%{values[argument]}"
    if isinstance(argument, Mapping):
        return tuple((key, _named(value, values)) for key, value in argument.items())
    if isinstance(argument, (tuple, list)):
        return tuple(_named(value, values) for value in argument)
    return repr(argument)
