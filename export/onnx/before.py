"""`Before`: nodes of a traced graph in front of one that is decomposed, of the same line, each with its value.

`arguments` are those of the one that is decomposed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


class Before:
    """Writes nodes in front of one.

    Args:
        node: The one whose place, line and module they have.
    """

    def __init__(self, node: fx.Node) -> None:
        self._node = node

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """One more node; its value in the trace is what the target makes of its arguments'.

        A target must read its sizes off tensors: `arange(n)` would take the example's n for any.
        """
        node = self._node
        assert node.graph is not None
        with node.graph.inserting_before(node):
            made = node.graph.call_function(target, args, kwargs)
        values = fx.map_arg(args, lambda argument: argument.meta["val"])
        made.meta.update(
            {**node.meta, "val": target(*values, **kwargs)}
        )  # a program is refused without values
        return made

    def size(self, value: fx.Node, axis: int) -> fx.Node:
        """The size of an axis; the exporter's form for one that is counted from the last is empty."""
        return self(torch.ops.aten.sym_size.int, value, axis % value.meta["val"].dim())


def arguments(node: fx.Node, *defaults: Any) -> tuple[Any, ...]:
    """What a node is given by place, and defaults of the places behind; there is one for each place."""
    return (*node.args, *defaults[len(node.args) :])
