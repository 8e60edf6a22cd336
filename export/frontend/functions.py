"""`as_module`: a free function, or a `functools.partial` of one, as a module that can be traced.

    def route(x, weight, k=2): ...          route = partial(route, k=4)

Modules and parameters that it reads from its closure or its file belong to it: they are put into eval mode, and are the
graph's weights.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn


def as_module(function: Callable[..., Any]) -> nn.Module:
    """A module whose `forward` is the function."""
    inner = _inner(function)
    name = getattr(inner, "__name__", type(inner).__name__)
    made: nn.Module = type(
        name, (nn.Module,), {"forward": staticmethod(function), "__module__": inner.__module__}
    )()
    for key, value in _read_by(inner):
        if isinstance(value, nn.Module):
            made.add_module(key, value)
        elif isinstance(value, nn.Parameter):
            made.register_parameter(key, value)
    return made


def needs_arguments(function: Any, given: Collection[str] = ()) -> bool:
    """Whether it is a function, not a class, that cannot be called with these arguments alone."""
    if isinstance(function, (type, nn.Module)) or not inspect.isroutine(_inner(function)):
        return False
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(
        each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and each.name not in given
        for each in parameters
    )


def _inner(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _read_by(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function reads from around it, by name."""
    try:
        found = inspect.getclosurevars(function)
    except TypeError:  # it is written in C
        return
    yield from {**found.globals, **found.nonlocals}.items()
