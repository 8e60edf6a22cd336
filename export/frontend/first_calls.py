"""The first calls of a model, as it was loaded: what it returns, and what it leaves behind for the next call.

left behind by the first call alone     a cache: masks by length, a table on demand, a buffer that forward registers
by every call                           state: a counter, a running mean, keys and values
of that, with the same outputs          what the model hands to its owner: an auxiliary loss, a load of experts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.pytree import Leaf
from moe_export.export.frontend.state import LIBRARY, State

_WEIGHT = "parameter "  # how `State` names what is one
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Ran:
    """What came of the first calls of a model."""

    found: list[Leaf]
    state: State
    changed: frozenset[str]
    cached: frozenset[str]
    unread: frozenset[str]


def first_calls(module: nn.Module, call: Callable[[], list[Leaf]], source: Path) -> Ran:
    """Call a model once, and once more if that changed its state: what changes each time is no cache.

    Raises:
        NotExportableError: It writes to weights that are too large to be put back.
    """
    if any(is_lazy(weight) for weight in [*module.parameters(), *module.buffers()]):
        call()  # it makes its weights, and becomes another class
    start = State.of(module, weights=True)
    before = start.with_globals()
    found = call()
    first = before.changed()
    if lost := before.lost():
        raise NotExportableError(
            f"a call of {type(module).__name__} writes to {min(lost)}, and its weights are too large to be put back",
            code=Code.STATE,
            where=str(source),
            hint="let forward compute with a copy of the weight",
        )
    again: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    if first:
        between = State.of(module, weights=any(what.startswith(_WEIGHT) for what in first)).with_globals()
        returned = [
            _copied(leaf.value) for leaf in found
        ]  # before a call that may write into what it returned
        later = call()
        again = between.changed()
        if _alike(
            returned, [leaf.value for leaf in later], _ROUNDING
        ):  # a norm that is limited again rounds again
            again = frozenset(what for what in again if not what.startswith(_WEIGHT))
        if _alike(returned, [leaf.value for leaf in later], 0.0):
            unread = again
    state = start.lasting()
    before.restore()
    cached = frozenset(what for what in first - again if not what.startswith(LIBRARY))
    return Ran(found, state, again, cached, unread)


def _copied(value: Any) -> Any:
    return value.detach().clone() if is_tensor(value) else value


def _alike(ones: Sequence[Any], others: Sequence[Any], rtol: float) -> bool:
    """Whether two calls gave the same, a NaN equal to itself."""
    return len(ones) == len(others) and all(
        _is_dense(one)
        and _is_dense(other)
        and one.shape == other.shape
        and torch.allclose(_wide(one), _wide(other), rtol=rtol, atol=rtol, equal_nan=True)
        if is_tensor(one) and is_tensor(other)
        else type(one) is type(other) and bool(one == other)
        for one, other in zip(ones, others, strict=True)
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor; for `map` and `filter`."""
    return isinstance(value, torch.Tensor)
