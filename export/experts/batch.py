"""Trace the body of one expert, and the same body for several experts at once.

For several, the body is vectorised by `torch.func.vmap` over the pairs, the expert's number and its weights. A few
operators would fix B or R there, so they are written in terms of others first (`_SPELLED`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from moe_export.export.torch_compat.caches import cache_patches
from moe_export.export.tracing.trace import quiet

_aten = torch.ops.aten


def trace_body(
    body: fx.GraphModule, example: Sequence[torch.Tensor], free: Sequence[Sequence[bool]]
) -> ExportedProgram:
    """The functional program of a body.

    Args:
        body: `(token (R,), slot (R,), expert (1,), *shared, *weights) → rows (R, ...)`.
        example: Its arguments.
        free: For each argument, which of its axes may have any size.
    """
    spec = tuple(tuple(Dim.AUTO if axis else None for axis in axes) for axes in free)
    return _export(body, tuple(value.clone() for value in example), spec)


def trace_batched(body: fx.GraphModule, example: Sequence[torch.Tensor], shared: int) -> ExportedProgram:
    """The functional program of a body for B experts: pairs (B, R), numbers (B, 1), weights (B, ...) → (B, R, ...).

    Args:
        body: The body of one expert.
        example: Its arguments.
        shared: How many of them are shared by all experts.

    Raises:
        Exception: An operator of the body cannot be vectorised for every B and R; torch says which.
    """
    values = [
        value.clone() if 3 <= index < 3 + shared else torch.stack([value, value])
        for index, value in enumerate(example)
    ]
    pairs = (Dim.DYNAMIC, Dim.DYNAMIC)
    spec: list[tuple[Any, ...]] = [pairs, pairs, (Dim.DYNAMIC, None)]
    spec += [(Dim.AUTO,) * value.dim() for value in example[3 : 3 + shared]]
    spec += [(Dim.DYNAMIC, *[None] * value.dim()) for value in example[3 + shared :]]
    return _export(_Batched(body, shared), (tuple(values),), (tuple(spec),))


def _export(module: nn.Module, inputs: tuple[Any, ...], spec: tuple[Any, ...]) -> ExportedProgram:
    with quiet(), torch.no_grad(), cache_patches():
        program = torch.export.export(module, inputs, dynamic_shapes=spec, strict=False)
        functional: ExportedProgram = program.run_decompositions({})
        return functional


class _Batched(nn.Module):
    """A body, vectorised over a first axis of experts."""

    def __init__(self, body: fx.GraphModule, shared: int) -> None:
        super().__init__()
        self._body = body
        self._shared = shared

    def forward(self, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        weights = len(arguments) - 3 - self._shared
        axes = (0, 0, 0, *[None] * self._shared, *[0] * weights)
        return torch.func.vmap(_Spelled(self._body).run, in_dims=axes)(*arguments)  # type: ignore[no-any-return]


class _Spelled(fx.Interpreter):
    """Runs a body with the operators of `_SPELLED` replaced."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(_SPELLED.get(target, target), args, kwargs)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` of rows with axes in front of them, which the operator would merge into one, and so fix their sizes."""
    if x.dim() == 2:
        return torch.nn.functional.linear(x, weight, bias)
    lined_up = weight.mT.reshape(*[1] * (x.dim() - 2), *weight.mT.shape)
    product = torch.matmul(x, lined_up)
    return product if bias is None else product + bias


def _layer_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    normed = centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _split(x: torch.Tensor, size: int, dim: int = 0) -> list[torch.Tensor]:
    total = int(x.shape[dim])
    return _split_sizes(x, [min(size, total - start) for start in range(0, total, size)], dim)


def _split_sizes(x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> list[torch.Tensor]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def _index_select(x: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    return x[(slice(None),) * (dim % x.dim()) + (index,)]


def _gather(x: torch.Tensor, dim: int, index: torch.Tensor, *, sparse_grad: bool = False) -> torch.Tensor:
    places = [
        torch.arange(size, device=x.device).view([-1 if other == axis else 1 for other in range(x.dim())])
        for axis, size in enumerate(index.shape)
    ]
    places[dim] = index
    return x[tuple(places)]


_SPELLED: dict[Any, Callable[..., Any]] = {
    _aten.linear.default: _linear,
    _aten.layer_norm.default: _layer_norm,
    _aten.index_select.default: _index_select,
    _aten.gather.default: _gather,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split_sizes,
}
