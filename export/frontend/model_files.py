"""The global names of the files that a model's code stands in (`global_names`) or can reach (`names_reached`).

What stands for a name there while a model runs (`int`, a scan in passes) changes nothing of Python, PyTorch or a
package that the model does not come from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache, lru_cache, partial
from inspect import isfunction
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from moe_export.export.frontend.source import is_user_file

_MEMO = type(lru_cache(lambda: None))


def global_names(model: nn.Module) -> list[dict[str, Any]]:
    """The global names of the files of a model's modules, and of what these import, as far as that is the user's.

    Returns:
        The dicts themselves, one for each file.
    """
    classes = {base for module in model.modules() for base in type(module).__mro__}
    waiting = [vars(sys.modules[base.__module__]) for base in classes if base.__module__ in sys.modules]
    waiting += [_globals_of(each) for base in classes for each in vars(base).values()]
    found = {id(names): names for names in waiting if _is_packages(names)}
    while waiting:
        names = waiting.pop()
        path = names.get("__file__")
        if id(names) in found or not isinstance(path, str) or not _is_users(path):
            continue
        found[id(names)] = names
        for each in list(names.values()):
            waiting.append(vars(each) if isinstance(each, ModuleType) else _globals_of(each))
    return list(found.values())


def names_reached(roots: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """The global names of the user's files that calls can reach.

    The files of what is called, what these import at the top or inside a function, the files of the objects there, and
    the file that runs as a program. Where code there can reach any file, because it makes a name at run time, all.

    Args:
        roots: What is called: classes, functions, objects.

    Returns:
        The dicts themselves, by file.
    """
    waiting: list[Any] = [*roots, sys.modules.get("__main__")]
    files = [
        each for each in list(sys.modules.values()) if isinstance(each, ModuleType) and _is_users_module(each)
    ]
    found, words, seen = dict[str, dict[str, Any]](), set[str](), dict[int, Any]()
    while waiting:
        while waiting:
            value = waiting.pop()
            if id(value) not in seen:
                seen[id(value)] = value
                waiting += _held_by(value)
                for file, names in _own_names(value):
                    waiting += names.values() if found.setdefault(file, names) is names else ()
                if isfunction(value) and _is_users_function(value):
                    words |= _words(value.__code__)
        any_file = _ANY_FILE & words or {"sys", "modules"} <= words
        # What is imported where a function runs.
        named = [other for other in files if any_file or other.__name__.rpartition(".")[2] in words]
        waiting += [other for other in named if id(other) not in seen]
    return found


def _own_names(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file and the global names of a module or a function of the user's."""
    if isinstance(value, ModuleType) and _is_users_module(value):
        yield str(value.__file__), vars(value)
    elif isfunction(value) and _is_users_function(value):
        yield value.__code__.co_filename, value.__globals__


def _is_users_function(function: FunctionType) -> bool:
    return is_user_file(function.__code__.co_filename)


_ANY_FILE = frozenset({"import_module", "__import__", "exec", "gc"})


def _is_users_module(module: ModuleType) -> bool:
    return _is_users(str(getattr(module, "__file__", None)))


def _held_by(value: Any) -> list[Any]:
    """What a function, a method, a class of somebody's or an object of it leads to: functions, classes, files."""
    if isinstance(value, type):
        own = [*vars(value).values(), sys.modules.get(value.__module__)] if _is_somebodys(value) else []
        return [*own, *value.__bases__]
    if isinstance(value, ModuleType):
        return []
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        return [value.__func__, getattr(value, "__self__", None)]
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    held: list[Any] = [type(value)]
    if isfunction(value) or isinstance(value, _MEMO):
        held.append(getattr(value, "__wrapped__", None))
    for cell in (value.__closure__ or ()) if isfunction(value) else ():
        with suppress(ValueError):  # nothing was assigned to it yet
            held.append(cell.cell_contents)
    return held


def _is_somebodys(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    return module is None or kind.__module__ == "__main__" or _is_users_module(module)


@cache
def _words(code: CodeType) -> frozenset[str]:
    """The names that code says: `from .tables import COUNT` says that of a file."""
    own = {part for name in code.co_names for part in name.split(".")}
    return frozenset(own).union(*(_words(each) for each in code.co_consts if isinstance(each, CodeType)))


def _globals_of(value: Any) -> dict[str, Any]:
    if isinstance(value, type):
        return next((_globals_of(each) for each in vars(value).values() if isfunction(each)), {})
    found = getattr(value, "__globals__", None) if isfunction(value) else None
    return found if isinstance(found, dict) else {}


def _is_packages(names: Mapping[str, Any]) -> bool:
    """Whether a file's global names are those of an installed package that is not PyTorch."""
    path, package = names.get("__file__"), str(names.get("__name__")).partition(".")[0]
    installed = isinstance(path, str) and path.endswith(".py") and "site-packages" in Path(path).parts
    return installed and package not in ("torch", "moe_export")


@cache
def _is_users(path: str) -> bool:
    return path.endswith(".py") and is_user_file(path)
