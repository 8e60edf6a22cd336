"""What the trace under way knows: the node that makes a tensor, and which modules it is in.

- `node_of`. Why: a model that asks its tensors a question while it is traced is answered by what they were computed
  from. The tracer keeps that in a table which no public function reads.
- `modules_left`. Why: the tracer notes which modules it is in, and forgets to leave one that ends in an exception; if
  the trace then goes on, it refuses.

Seen in torch 2.13.0 and 2.14.1 (`torch.fx.experimental.proxy_tensor`: `get_proxy_mode`, `get_proxy_slot`; a tracer's
`module_stack`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.experimental import proxy_tensor


def node_of(tensor: Any) -> fx.Node | None:
    """The node; None outside a trace, and for what is no tensor of it."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None or not isinstance(tensor, torch.Tensor):
        return None
    slot = proxy_tensor.get_proxy_slot(tensor, mode.tracer, None)
    return slot.proxy.node if slot is not None else None


@contextmanager
def modules_left() -> Iterator[None]:
    """After it, the trace under way is in the modules that it was in before, also after an exception."""
    mode = proxy_tensor.get_proxy_mode()
    stack = getattr(mode.tracer, "module_stack", None) if mode is not None else None
    before = dict(stack) if stack is not None else {}
    try:
        yield
    finally:
        if stack is not None:
            for key in [key for key in stack if key not in before]:
                del stack[key]
