"""A PyTorch model's choices among scores, recorded or replayed while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_export.verify.torch_compat import OperatorMode


class ChoiceWatcher(OperatorMode):
    """Records each choice of the largest values along an axis, in order.

    Attributes:
        found: (positions, scores) of every `topk`, the axis of the choice moved to the end.
    """

    def __init__(self) -> None:
        super().__init__()
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


class ChoiceForcer(OperatorMode):
    """Replaces each choice of the largest values along an axis by an earlier one, in order.

    Args:
        ids: Positions, the axis of the choice at the end.

    Attributes:
        fits: Whether as many choices were made, of the same sizes.
    """

    def __init__(self, ids: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._ids = list(ids)
        self._wrong = False

    @property
    def fits(self) -> bool:
        """Whether every stored choice was used, and there was no other."""
        return not self._ids and not self._wrong

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
                return self._instead(args[0], dim, result)
        return result

    def _instead(self, scores: torch.Tensor, dim: int, own: Any) -> Any:
        if not self._ids:
            self._wrong = True
            return own
        ids = self._ids.pop(0).movedim(-1, dim)
        if ids.shape != own[1].shape:
            self._wrong = True
            return own
        return type(own)((scores.gather(dim, ids), ids))
