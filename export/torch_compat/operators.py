"""What an operator says of itself, and PyTorch's functions that have no public name.

- `arguments_of`: the names and types of an operator's arguments. Why: `OpOverload._schema` is the only place that has
  them; `torch.library` writes schemas and does not read them.
- `is_functional`: whether no operator of a graph writes into its input, or runs a graph of its own. Why: the same
  schema says so, and the type of operators with graphs has no public name.
- `writes_to`: whether a large tensor was written to, without comparing its values. Why: it is what autograd counts by,
  under a private name.
- `GROUPED_MM`: the public function, and the private one that it calls, which is what libraries call, too.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

GROUPED_MM = (torch.nn.functional.grouped_mm, torch._grouped_mm)


def arguments_of(target: Any) -> list[Any]:
    """The arguments of an operator, in order: each has `name`, `type` and `kwarg_only`; none of another function."""
    schema = getattr(target, "_schema", None)
    return list(schema.arguments) if schema is not None else []


def writes_to(tensor: torch.Tensor) -> int:
    """PyTorch's count of writes to a tensor; 0 of one for inference, whose writes are not counted."""
    return 0 if tensor.is_inference() else tensor._version


def is_functional(graph: fx.Graph) -> bool:
    """Whether a graph is right without functionalization: nothing in it writes, or holds a graph of its own."""
    return not any(
        node.op in ("get_attr", "call_module")
        or (
            node.op == "call_function"
            and (
                isinstance(node.target, torch._ops.HigherOrderOperator)
                or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)
            )
        )
        for node in graph.nodes
    )
