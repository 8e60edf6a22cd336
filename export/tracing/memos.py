"""Functions that remember their results (`functools.lru_cache`, `functools.cache`), traced as if they did not.

    @lru_cache
    def table(length): return torch.arange(length).outer(frequencies)

A symbolic length is no key of a cache; and what the tracer puts in is no tensor that the model could use afterwards. So
while a model is traced, the names of such functions in the user's files and in those of the model's classes stand for
the functions themselves, and what they had remembered is forgotten before and after.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from moe_export.export.frontend.source import is_own_file, is_user_file

_Memo = type(lru_cache(lambda: None))


@dataclass(frozen=True)
class _Place:
    """Where a function that remembers stands.

    Attributes:
        owner: Globals, or a class.
        name: Its name there.
        value: What stands there: the function, or a static or class method of it.
        memo: The function.
    """

    owner: Any
    name: str
    value: Any
    memo: Any

    def put(self, *, plain: bool) -> None:
        """Let the name stand for the function itself, or for what stood there."""
        value = self.value
        if plain:
            function = self.memo.__wrapped__
            value = function if self.value is self.memo else type(self.value)(function)
        if isinstance(self.owner, type):
            setattr(self.owner, self.name, value)
        else:
            self.owner[self.name] = value
        self.memo.cache_clear()


@contextmanager
def without_memos(module: nn.Module) -> Iterator[None]:
    """Inside, what the model calls is computed each time.

    Args:
        module: The model.
    """
    places = list(_memos(module))
    try:
        for place in places:
            place.put(plain=True)
        yield
    finally:
        for place in places:
            place.put(plain=False)


def _memos(module: nn.Module) -> Iterator[_Place]:
    for namespace, users in _namespaces(module):
        own = [kind for kind in namespace.values() if isinstance(kind, type)]
        own = [kind for kind in own if kind.__module__ == namespace.get("__name__")]
        for owner in (namespace, *own):
            for name, value in list((owner if isinstance(owner, dict) else vars(owner)).items()):
                memo = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
                if isinstance(memo, _Memo) and not _is_ours(memo) and (users or _is_near(memo, module)):
                    yield _Place(owner, name, value, memo)


def _is_ours(memo: Any) -> bool:
    """Whether a function is this tool's, which the user's file imported: it takes no part in the model."""
    code = getattr(memo.__wrapped__, "__code__", None)
    return code is not None and is_own_file(code.co_filename)


def _is_near(memo: Any, module: nn.Module) -> bool:
    """Whether a library's function takes part in the model: it lies in a package of one of the model's classes."""
    packages = {_package(type(part)) for part in module.modules()} - {"torch"}
    return _package(memo.__wrapped__) in packages


def _package(definition: Any) -> str:
    return str(getattr(definition, "__module__", "")).partition(".")[0]


def _namespaces(module: nn.Module) -> list[tuple[dict[str, Any], bool]]:
    """The globals of the user's files, and of the files of the model's classes; and whether they are the user's."""
    found: dict[int, tuple[dict[str, Any], bool]] = {}
    for other in list(sys.modules.values()):
        file = getattr(other, "__file__", None)
        if isinstance(other, types.ModuleType) and isinstance(file, str) and is_user_file(file):
            found[id(vars(other))] = (vars(other), True)
    for kind in {base for part in module.modules() for base in type(part).__mro__}:
        forward = vars(kind).get("forward")
        if not isinstance(forward, types.FunctionType):
            continue
        file = forward.__code__.co_filename
        if not is_own_file(file) and not kind.__module__.startswith("torch."):
            found.setdefault(id(forward.__globals__), (forward.__globals__, is_user_file(file)))
    return list(found.values())
