"""What the trace under way knows: the node that makes a tensor, and which modules it is in.

- `node_of`. Why: a model that asks its tensors a question while it is traced is answered by what they were computed
  from. The tracer keeps that in a table which no public function reads.
- `modules_left`. Why: the tracer notes which modules it is in, and forgets to leave one that ends in an exception; if
  the trace then goes on, it refuses.
- `untraced`. Why: what a step of a loop reads from around it must be known before the loop is traced, and running the
  step to see that must leave nothing in the graph.

Seen in torch 2.13.0 and 2.14.1 (`torch.fx.experimental.proxy_tensor`: `get_proxy_mode`, `get_proxy_slot`,
`disable_proxy_modes_tracing`; a tracer's `module_stack`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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


_UNTRACED = ContextVar("outside of the trace", default=False)


def untraced(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on tensors of the trace under way without a mark in its graph."""
    before = _UNTRACED.set(True)
    try:
        with proxy_tensor.disable_proxy_modes_tracing():
            return function(*args)
    finally:
        _UNTRACED.reset(before)


def is_tracing() -> bool:
    """Whether operators are noted in a graph right now."""
    return proxy_tensor.get_proxy_mode() is not None


def is_untraced() -> bool:
    """Whether what runs is `untraced`."""
    return _UNTRACED.get()


def is_traced(value: Any) -> bool:
    """Whether a value is a tensor of the trace under way."""
    return node_of(value) is not None or (is_untraced() and isinstance(value, torch.Tensor))


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
