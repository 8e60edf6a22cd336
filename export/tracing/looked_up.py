"""`looked_up`: one of some modules, picked by a number that only the graph knows, as in experts token by token.

    for i in range(len(x)):
        for j in range(k):
            e = indices[i, j].item()
            out[i] += weights[i, j] * experts[e](x[i])        stack([expert(x[i]) for expert in experts])[e]

A trace cannot know which module runs. So all of them do, and the result is looked up instead of the module. The loop
over tokens is then one like any other, and folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from moe_export.errors import Code, NotExportableError
from moe_export.export.sizes import fixed
from moe_export.export.torch_compat.modules import lookups
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.torch_compat.proxies import is_traced
from moe_export.export.tracing.asked_numbers import AskedNumber, element
from moe_export.export.tracing.not_hit import asking_frame, place_of


class OneOf:
    """One of some modules, by a number: called as a module is, and with the weights and submodules of one.

    Args:
        modules: At least one.
        number: Which of them.
        place: `file:line` of the lookup.
    """

    def __init__(self, modules: Sequence[nn.Module], number: AskedNumber, place: str) -> None:
        self._modules, self._number, self._place = modules, number, place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        results = [pytree.tree_flatten(module(*args, **kwargs)) for module in self._modules]
        _, nesting = results[0]
        if any(other != nesting for _, other in results):
            self._refuse("results of different kinds")
        rows = zip(*(leaves for leaves, _ in results), strict=True)
        return pytree.tree_unflatten([self._picked(row) for row in rows], nesting)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        return self._part([getattr(module, name) for module in self._modules])

    def __getitem__(self, index: Any) -> Any:
        return self._part([module[index] for module in self._modules])  # type: ignore[index]

    def _part(self, values: Sequence[Any]) -> Any:
        if all(isinstance(value, nn.Module) for value in values):
            return OneOf(values, self._number, self._place)
        return self._picked(values)

    def _picked(self, values: Sequence[Any]) -> Any:
        first = values[0]
        if not isinstance(first, torch.Tensor):
            if any(value is not first and value != first for value in values):
                self._refuse(f"{first!r} and others")
            return first
        if len({(value.dtype, tuple(map(fixed, value.shape))) for value in values}) > 1:
            self._refuse("tensors of different types or shapes")
        return element(torch.stack(list(values)), (self._number,))

    def _refuse(self, what: str) -> None:
        raise NotExportableError(
            f"modules that are looked up by a number of the data give {what}",
            code=Code.VALUES_DECIDE,
            where=self._place,
            hint="a graph computes all of them and takes one, so they have to give tensors of one type and shape",
        )


def looked_up(note: Callable[[str], None]) -> AbstractContextManager[None]:
    """While it runs, a list of modules gives `OneOf` for a number of the graph.

    Args:
        note: Is given the line, `file:line`.
    """

    def one_of(modules: nn.ModuleList | nn.Sequential, index: Any) -> OneOf | None:
        number = AskedNumber(index) if _is_number(index) else index
        if not isinstance(number, AskedNumber) or not len(modules):
            return None
        frame = asking_frame()
        place = "" if frame is None else place_of(frame)
        note(place)
        return OneOf(list(modules), number, place)

    return lookups(one_of)


def _is_number(value: Any) -> bool:
    """Whether a value is an integer tensor of one element that is computed in the trace under way."""
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int64, torch.int32):
        return False
    return all(isinstance(size, int) and size == 1 for size in value.shape) and is_traced(value)
