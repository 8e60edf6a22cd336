"""What is changed, or seen, while a PyTorch model runs: everything in float64, and its choices among scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class _Wide(TorchFunctionMode):
    """Where the model's code names a narrower float, float64 is meant."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = torch.Tensor.double if func in _CASTS else func
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Floats that are made here, or cast to a narrower float, are float64. Weights are the caller's to cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)


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
