"""What is seen while a PyTorch model runs: its choices among scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ChoiceWatcher(TorchDispatchMode):
    """Notes each choice of the largest along an axis, in order.

    Attributes:
        found: (positions, scores) of every `topk`, the axis of the choice moved to the end.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default:
            dim = args[2] if len(args) > 2 else -1
            largest = args[3] if len(args) > 3 else (kwargs or {}).get("largest", True)
            if largest:
                pair = (result[1].detach(), args[0].detach())
                positions, scores = (value.movedim(dim, -1).clone() for value in pair)
                self.found.append((positions, scores))
        return result
