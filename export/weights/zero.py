"""`ZeroProducts`: run a model whose weights are not in memory, without multiplying by the zeros in their place.

A product with a matrix of zeros is zeros, and what is picked from zeros is, too. So neither is computed: a model of
any size runs in the time that its other operators take.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from moe_export.export.torch_compat.dispatch import OperatorMode
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.weights.lazy import LazyWeights, lazy_weight_of

_aten = torch.ops.aten

_PRODUCTS = {_aten.mm.default: (0, 1), _aten.bmm.default: (0, 1)}
"""Products, and the operands of which one that is zero is enough."""

_SUMS = {_aten.addmm.default: (1, 2), _aten.baddbmm.default: (1, 2)}
"""The same with something added: the first operand."""

_PICKS = {
    _aten.index.Tensor,
    _aten.index_select.default,
    _aten.embedding.default,
    _aten.gather.default,
    _aten.clone.default,
    _aten._to_copy.default,
}
"""What gives zeros of zeros, in new memory."""


class ZeroProducts(OperatorMode):
    """While it is entered, what comes of absent weights by products and picking is zeros, uncomputed."""

    def __init__(self) -> None:
        super().__init__()
        self._zeros: dict[int, torch.Tensor] = {}  # they are kept, so that no other tensor takes their place

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and any(self._is_zero(args[place]) for place in _PRODUCTS[func]):
            return self._made(func, args, kwargs, keep=False)
        if func is _aten._grouped_mm.default and args[0].dim() == 2 and self._is_zero(args[1]):
            return args[0].new_zeros(args[0].shape[0], args[1].shape[-1])
        if func in _SUMS and any(self._is_zero(args[place]) for place in _SUMS[func]):
            made = self._made(func, args, kwargs, keep=False)
            return made.add_(args[0], alpha=kwargs.get("beta", 1))
        if func in _PICKS and self._is_zero(args[0]):
            return self._made(func, args, kwargs, keep=True)
        return func(*args, **kwargs)

    def _is_zero(self, value: Any) -> bool:
        if not isinstance(value, torch.Tensor):
            return False
        item = lazy_weight_of(value)
        if item is not None:
            return not item.full
        return bool(self._zeros) and value.untyped_storage().data_ptr() in self._zeros

    def _made(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, keep: bool
    ) -> torch.Tensor:
        """Zeros of the shape and dtype that an operator would give."""
        shapes = pytree.tree_map_only(torch.Tensor, lambda value: value.to("meta"), (args, kwargs))
        like = func(*shapes[0], **shapes[1])
        made = torch.zeros(like.shape, dtype=like.dtype)
        if keep:
            self._zeros[made.untyped_storage().data_ptr()] = made
        return made


def without_weights(weights: LazyWeights | None) -> AbstractContextManager[Any]:
    """What a model is run in: `ZeroProducts` if a weight is not in memory."""
    return ZeroProducts() if weights is not None and weights.absent else nullcontext()
