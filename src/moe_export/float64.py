"""A PyTorch model run in float64: what its code casts to a narrower float is float64, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


def _grouped_mm(
    rows: torch.Tensor, stack: torch.Tensor, offs: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """`grouped_mm`, which has no kernel for float64: each group of rows (S, a) by its own matrix of (E, a, b)."""
    if offs is None or rows.dim() != 2 or stack.dim() != 3:
        raise NotImplementedError("grouped_mm in float64 takes rows and stacked matrices")
    ends = offs.tolist()
    groups = zip([0, *ends], ends, stack, strict=False)
    found = torch.cat([rows[start:end] @ matrix for start, end, matrix in groups])
    rest = rows.new_zeros(len(rows) - len(found), stack.shape[-1])
    return torch.cat([found, rest])


class _Wide(TorchFunctionMode):
    """Where the model's code names a narrower float, float64 is meant."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            func = torch.Tensor.double
        elif (
            getattr(func, "__name__", "").lstrip("_") == "grouped_mm"
        ):  # PyTorch's, and the one that this calls
            func = _grouped_mm
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
