"""Values that a block takes and that the model never computes: the choices of all slots side by side, the expert of
each pair that a capacity kept, what a mask holds for a pair.

They are all that finding blocks writes, into the stage's own copy of the program. Nothing there uses them until a block
is outlined, so where a block is refused they go as dead code. What is found reads them like any other value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def derived(like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Write one operator behind the last of the values that it takes.

    Args:
        like: A node of the block, whose line and module the new one is given.
        target: An ATen operator.
        *args: What it takes; at least one is a node.
        **kwargs: The same, by name.
    """
    taken: list[fx.Node] = []
    fx.map_arg((args, kwargs), taken.append)
    with like.graph.inserting_after(max(taken)):
        node = like.graph.call_function(target, args, kwargs)
    values, keywords = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
    node.meta = {**like.meta, "val": target(*values, **keywords)}
    return node
