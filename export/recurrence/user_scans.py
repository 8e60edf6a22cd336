"""Parallel scans that users write as `torch.autograd.Function`s, step by step while loops are folded.

Training code computes `h(t) = a(t) h(t - 1) + x(t)` in passes over ever longer spans (Blelloch's scan, as in mambapy's
`pscan` and its many copies). The passes differ at every length, so a trace of them only holds for one length. But what
the function computes can be found out by running it: each function of two tensors of the same shape is run on random
values at several lengths, and if along some axis it gives what the loop gives, the loop is traced in its place, which
folds into one Scan, for any length.

Source of the passes: G. Blelloch, Prefix sums and their applications, CMU-CS-90-190.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_export.export.torch_compat.dispatch import no_modes
from moe_export.export.torch_compat.functions import forwards

_LENGTHS = (1, 2, 3, 5, 8, 13)
_SIZES = (2, 3, 4, 2, 3)  # of the other axes
_CLOSE = 1e-9  # of the largest value, in float64: passes and steps only differ in rounding


def scans_step_by_step() -> AbstractContextManager[None]:
    """A context manager in which users' autograd functions that are linear scans run as loops over time."""
    return forwards(_instead_of)


def scan(decay: Tensor, added: Tensor, axis: int) -> Tensor:
    """`h(t) = decay(t) h(t - 1) + added(t)` from zeros, for each t.

    Args:
        decay: Floats of any shape.
        added: Floats of the same shape.
        axis: The axis of time.

    Returns:
        Every h, of the same shape.
    """
    state = added.new_zeros([*added.shape[:axis], *added.shape[axis + 1 :]])
    states = []
    for step in range(added.shape[axis]):
        state = decay.select(axis, step) * state + added.select(axis, step)
        states.append(state)
    return torch.stack(states, axis)


def _instead_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the original, or the loop if the original, when first called, turns out to be that loop."""
    known: dict[int, tuple[int, bool] | None] = {}

    def forward(context: Any, *arguments: Any) -> Any:
        if len(arguments) != 2 or not all(isinstance(each, Tensor) for each in arguments):
            return original(context, *arguments)
        first, second = arguments
        if first.shape != second.shape or not first.is_floating_point() or not 1 <= first.ndim <= len(_SIZES):
            return original(context, *arguments)
        if first.ndim not in known:
            known[first.ndim] = _as_scan(original, first.ndim)
        found = known[first.ndim]
        if found is None:
            return original(context, *arguments)
        axis, decay_is_first = found
        context.save_for_backward(first, second)
        return scan(first, second, axis) if decay_is_first else scan(second, first, axis)

    return forward


def _as_scan(original: Callable[..., Any], rank: int) -> tuple[int, bool] | None:
    """Along which axis a function is a scan, and whether the decay comes first; None for any other function."""
    with no_modes(), torch.no_grad():
        for axis in range(rank):
            for decay_is_first in (True, False):
                if all(_agrees(original, rank, axis, length, decay_is_first) for length in _LENGTHS):
                    return axis, decay_is_first
    return None


def _agrees(original: Callable[..., Any], rank: int, axis: int, length: int, decay_is_first: bool) -> bool:
    shape = list(_SIZES[:rank])
    shape[axis] = length
    generator = torch.Generator().manual_seed(length)
    decay, added = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted = scan(decay, added, axis)
    arguments = (decay, added) if decay_is_first else (added, decay)
    context = SimpleNamespace(
        save_for_backward=lambda *_: None,
        mark_non_differentiable=lambda *_: None,
        needs_input_grad=(False, False),
    )
    try:
        found = original(context, *(each.clone() for each in arguments))
    except Exception:  # it takes no such tensors
        return False
    return (
        isinstance(found, Tensor)
        and found.shape == wanted.shape
        and bool((found - wanted).abs().max() <= _CLOSE * wanted.abs().max())
    )
