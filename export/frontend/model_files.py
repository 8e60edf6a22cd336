"""`global_names`: the global names of the files that a model's code stands in.

What stands for a name there while a model runs (`int`, a scan in passes) changes nothing of Python, PyTorch or a
package that the model does not come from.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from inspect import isfunction
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from moe_export.export.frontend.source import is_user_file


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
