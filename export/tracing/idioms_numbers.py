"""`int(...)`, `float(...)` and `math.sqrt(...)` of a size, `max(...)` and `min(...)` of traced integers, traced as
functions of these.

A capacity is often `int(tokens / experts * factor)`. Python makes a plain number of it, and the tracer does not say
that the graph is then right at the traced size alone. `max(idx.max() + 1, n)` compares a number that a trace does not
know, which ends the trace. While a model is traced, these names stand for what leaves such a number a symbol; for
everything else they are Python's. They do so in the user's own files and in those that the model's classes stand in.

`math.sqrt(x.shape[-1])` makes a plain number in the same way. A file's `math`, or its `sqrt`, stands for one that takes
a root as `size ** 0.5` does, which is Python's number for every size up to 2**53.

A file that uses `int` or `float` for more than calls, annotations and `isinstance` (`dtype=int`) is left as it is.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from moe_export.export.frontend.model_files import global_names
from moe_export.export.torch_compat.proxies import is_traced
from moe_export.export.tracing.asked_numbers import AskedNumber, number_of

_SYMBOLS = (torch.SymInt, torch.SymFloat)


def _standing_for(plain: type, symbolic: Callable[[Any], Any]) -> type:
    """A class that is called as `plain`, and is taken for it by `isinstance`."""

    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            one = args[0] if len(args) == 1 and not kwargs else None
            if isinstance(one, torch.Tensor) and is_traced(one):
                one = number_of(one)
            if isinstance(one, AskedNumber):
                return one.as_int() if plain is int else one.as_float()
            return symbolic(one) if isinstance(one, _SYMBOLS) else plain(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, plain)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, plain)

        def __getattr__(cls, name: str) -> Any:
            return getattr(plain, name)

    return Meta(plain.__name__, (), {})


def _extreme(plain: Callable[..., Any], of_numbers: Any, of_tensors: Any) -> Callable[..., Any]:
    """`max` or `min` of integers some of which are tensors (): a number if any of them is one, else a tensor."""

    def extreme(*values: Any, **options: Any) -> Any:
        tensors = [value for value in values if _is_integer(value)]
        numbers = [value for value in values if isinstance(value, int | torch.SymInt)]
        symbols = [value for value in values if isinstance(value, torch.SymInt)]
        if (
            options
            or len(values) < 2
            or not (tensors or symbols)
            or len(tensors) + len(numbers) < len(values)
        ):
            return plain(*values, **options)
        if not numbers:
            return reduce(of_tensors, values)
        return reduce(of_numbers, [value.item() if _is_integer(value) else value for value in values])

    return extreme


def _is_integer(value: Any) -> bool:
    whole = isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and not value.is_complex()
    return whole and value.dim() == 0 and value.dtype is not torch.bool


_NAMES: dict[str, Callable[..., Any]] = {
    "int": _standing_for(int, torch.sym_int),
    "float": _standing_for(float, torch.sym_float),
    "max": _extreme(max, torch.sym_max, torch.maximum),
    "min": _extreme(min, torch.sym_min, torch.minimum),
}


def _root(number: Any) -> Any:
    """`math.sqrt`."""
    of_size: Callable[[Any], Any] = torch.sym_float
    return of_size(number) ** 0.5 if isinstance(number, _SYMBOLS) else math.sqrt(number)


class _Math(ModuleType):
    """`math` with the root of a size."""

    sqrt = staticmethod(_root)

    def __getattr__(self, name: str) -> Any:
        return getattr(math, name)


_STANDS_FOR: dict[int, Any] = {id(math): _Math("math"), id(math.sqrt): _root}


@contextmanager
def symbolic_numbers(model: nn.Module) -> Iterator[None]:
    """While it runs, these names keep sizes symbolic in the user's files that a model's code stands in."""
    added: list[tuple[dict[str, Any], str]] = []
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for names in global_names(model):
            for name, value in list(names.items()):
                if id(value) in _STANDS_FOR:
                    replaced.append((names, name, value))
                    names[name] = _STANDS_FOR[id(value)]
            for name in _called_in(names["__file__"]):
                if name not in names:
                    names[name] = _NAMES[name]
                    added.append((names, name))
        yield
    finally:
        for names, name in added:
            del names[name]
        for names, name, value in replaced:
            names[name] = value


@cache
def _called_in(path: str) -> tuple[str, ...]:
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ()
    allowed = {id(node) for root in ast.walk(tree) for node in _harmless(root)}
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in _NAMES]
    others = {node.id for node in named if id(node) not in allowed}
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NAMES
    }
    return tuple(sorted(called - others))


def _harmless(node: ast.AST) -> Iterator[ast.AST]:
    """The names within a node that may stand for another class: what is called, annotations, `isinstance`."""
    if isinstance(node, ast.Call):
        yield node.func
        if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
            yield from (inner for argument in node.args[1:] for inner in ast.walk(argument))
    annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    yield from (inner for each in annotations if isinstance(each, ast.AST) for inner in ast.walk(each))
