"""Parallel scans that users write in passes, as functions or `torch.autograd.Function`s, step by step in a fold.

Training code computes `h(t) = a(t) h(t - 1) + x(t)` in passes over ever longer spans (Blelloch's scan, as in mambapy's
`pscan` and its many copies), or hands an operator to a scan over a tree (`operator_scans`). The passes differ at every
length, so a trace of them only holds for one length. But what the function computes can be found out by running it:
each function of two tensors of the same shape is run on random values at several lengths, and if along some axis it
gives what the loop gives, the loop is traced in its place, which folds into one Scan, for any length.

Functions are looked for where the model's code finds them: under the global names of its files. One that takes more
operators evenly with the length is a loop already, and keeps its lines.

Source of the passes: G. Blelloch, Prefix sums and their applications, CMU-CS-90-190.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import isfunction
from types import FunctionType, SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from moe_export.export.frontend.model_files import global_names
from moe_export.export.recurrence.operator_scans import CLOSE, LENGTHS, Way, as_loop, scan_call, way_of
from moe_export.export.torch_compat.dispatch import no_modes
from moe_export.export.torch_compat.functions import forwards
from moe_export.export.tracing.lengths import OperatorCount

_SIZES = (2, 3, 4, 2, 3)  # of the other axes
_FROM, _STEPS = (
    16,
    16,
)  # a loop takes as many more operators for these steps as that many times for the first of them

OfTwo: TypeAlias = Callable[[Tensor, Tensor], Any]


@contextmanager
def scans_step_by_step(model: nn.Module) -> Iterator[None]:
    """While it runs, functions of the model's files and autograd functions that are scans run as loops over time."""
    changed: list[tuple[dict[str, Any], str, FunctionType]] = []
    instead = _Instead()
    try:
        for names in global_names(model):
            for name, value in list(names.items()):
                if isfunction(value) and value.__code__.co_argcount >= 2:
                    names[name] = instead.of_function(value)
                    changed.append((names, name, value))
        with forwards(_of_forward):
            yield
    finally:
        for names, name, value in changed:
            names[name] = value


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


class _Instead:
    """Functions in whose place loops run; while one is tried, those that it calls are themselves."""

    def __init__(self) -> None:
        self._trying = False

    def of_function(self, original: FunctionType) -> Callable[..., Any]:
        """A function that calls the original, or the loop if the original, when first called, turns out to be one."""
        of_two = _LinearScans(original)
        ways: dict[tuple[Any, ...], Way | None] = {}

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._trying:
                return original(*args, **kwargs)
            found = None
            self._trying = True
            try:
                given = scan_call(original, args, kwargs)
                if given is not None and given.kind not in ways and not given.symbolic:
                    ways[given.kind] = way_of(given)
                elif given is None and not kwargs:
                    found = of_two.loop(args)
            finally:
                self._trying = False
            way = None if given is None else ways.get(given.kind)
            if given is not None and way is not None:
                return as_loop(given, way)
            return original(*args, **kwargs) if found is None else found()

        return call


def _of_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd function's `forward`, or the loop that it stands for."""
    context_of_none = SimpleNamespace(
        save_for_backward=lambda *_: None,
        mark_non_differentiable=lambda *_: None,
        needs_input_grad=(False, False),
    )
    of_two = _LinearScans(lambda first, second: original(context_of_none, first, second))

    def forward(context: Any, *arguments: Any) -> Any:
        found = of_two.loop(arguments)
        if found is None:
            return original(context, *arguments)
        context.save_for_backward(*arguments)
        return found()

    return forward


class _LinearScans:
    """Whether a function of two tensors is `scan`, asked once for each rank."""

    def __init__(self, run: OfTwo) -> None:
        self._run = run
        self._known: dict[int, tuple[int, bool] | None] = {}

    def loop(self, arguments: tuple[Any, ...]) -> Callable[[], Tensor] | None:
        """What computes the call's result step by step; None if these are no arguments of a scan."""
        if len(arguments) != 2 or not all(isinstance(each, Tensor) for each in arguments):
            return None
        first, second = arguments
        if first.shape != second.shape or not first.is_floating_point() or not 1 <= first.ndim <= len(_SIZES):
            return None
        if first.ndim not in self._known:
            self._known[first.ndim] = _as_scan(self._run, first.ndim)
        found = self._known[first.ndim]
        if found is None:
            return None
        axis, decay_is_first = found
        return lambda: scan(first, second, axis) if decay_is_first else scan(second, first, axis)


def _as_scan(run: OfTwo, rank: int) -> tuple[int, bool] | None:
    """Along which axis a function is a scan in passes, and whether the decay comes first; None if it is not."""
    with no_modes(), torch.no_grad():
        for axis in range(rank):
            for decay_is_first in (True, False):
                if all(_agrees(run, rank, axis, length, decay_is_first) for length in LENGTHS):
                    return None if _is_loop(run, rank, axis) else (axis, decay_is_first)
    return None


def _agrees(run: OfTwo, rank: int, axis: int, length: int, decay_is_first: bool) -> bool:
    decay, added = _random(rank, axis, length)
    wanted = scan(decay, added, axis)
    arguments = (decay, added) if decay_is_first else (added, decay)
    try:
        found = run(*(each.clone() for each in arguments))
    except Exception:  # it takes no such tensors
        return False
    return (
        isinstance(found, Tensor)
        and found.shape == wanted.shape
        and found.dtype == wanted.dtype
        and bool((found - wanted).abs().max() <= CLOSE * wanted.abs().max())
    )


def _is_loop(run: OfTwo, rank: int, axis: int) -> bool:
    """Whether each step of time takes as many operators as any other."""
    counts = []
    for length in (_FROM, _FROM + 1, _FROM + _STEPS):
        with OperatorCount() as count:
            run(*_random(rank, axis, length))
        counts.append(count.operators)
    first, second, last = counts
    return bool(last - first == _STEPS * (second - first) > 0)


def _random(rank: int, axis: int, length: int) -> tuple[Tensor, Tensor]:
    shape = list(_SIZES[:rank])
    shape[axis] = length
    drawn = np.random.default_rng(length)  # PyTorch's own are refused within `torch.vmap`
    decay, added = (torch.from_numpy(drawn.standard_normal(shape)) for _ in range(2))
    return decay, added
