"""`node_of`: the node of the trace under way that makes a tensor.

Why: a model that asks its tensors a question while it is traced is answered by what they were computed from. The tracer
keeps that in a table which no public function reads.

Seen in torch 2.13.0 and 2.14.1 (`torch.fx.experimental.proxy_tensor`: `get_proxy_mode`, `get_proxy_slot`).
"""

from __future__ import annotations

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
