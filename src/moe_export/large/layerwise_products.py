"""`WideProducts`: half-precision matrix products of PyTorch on the CPU, at the speed of float32.

On a processor without float16 instructions, PyTorch multiplies element by element, sums in float32 and rounds once at
the end; a layer of experts takes minutes. Here both operands are widened, a block of columns or one expert at a time,
multiplied by the float32 kernel and rounded once: the same sums in another order.

Letters: N rows, K summed, M columns, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_export.export.torch_compat.dispatch import OperatorMode

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_AT_ONCE = 2**24
"""The number of elements that are widened at once: 64 MiB as float32."""


class WideProducts(OperatorMode):
    """A mode in which products of half-precision matrices are computed in float32; every other call is unchanged."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        found = replacement(*args, **(kwargs or {})) if replacement is not None else None
        return func(*args, **(kwargs or {})) if found is None else found


def _half(*values: Any) -> bool:
    """Whether all are half-precision tensors of one dtype, on the CPU."""
    return all(
        isinstance(value, torch.Tensor) and value.dtype in _HALF and value.device.type == "cpu"
        for value in values
    ) and all(value.dtype == values[0].dtype for value in values)


def _mm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
    """(N, K) @ (K, M)."""
    return _product(x, w, None) if _half(x, w) else None


def _addmm(
    bias: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor | None:
    if not _half(bias, x, w) or (beta, alpha) != (1, 1):
        return None
    return _product(x, w, bias.expand(x.shape[0], w.shape[1]))


def _bmm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
    """(B, N, K) @ (B, K, M)."""
    if not _half(x, w) or not len(x):
        return None
    return torch.stack([_product(one, other, None) for one, other in zip(x, w, strict=True)])


def _grouped_mm(
    x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor | None = None, *others: Any, **named: Any
) -> Any:
    """Rows (N, K), sorted by expert, each times its matrix of (E, K, M); `offs` (E,) are the ends of experts' rows."""
    given = [value for value in (*others, *named.values()) if value is not None]
    if not _half(x, w) or offs is None or given or (x.dim(), w.dim()) != (2, 3):
        return None
    found = x.new_empty(x.shape[0], w.shape[2])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            found[start:end] = _product(x[start:end], w[expert], None)
        start = max(start, end)
    return found


def _product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(N, K) @ (K, M) + bias (N, M), summed in float32, in the dtype of `x`."""
    found = x.new_empty(x.shape[0], w.shape[1])
    wide = x.float()
    step = max(1, _AT_ONCE // max(1, w.shape[0]))
    for start in range(0, w.shape[1], step):
        columns = slice(start, start + step)
        part = wide @ w[:, columns].float()
        found[:, columns] = part if bias is None else part + bias[:, columns]
    return found


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _aten._grouped_mm.default: _grouped_mm,
}
