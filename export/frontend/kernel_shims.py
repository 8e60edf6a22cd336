"""Shims for packages of GPU kernels that a model file imports: the same in plain PyTorch.

    from mamba_ssm import Mamba                              kernels.mamba_blocks.Mamba, if mamba_ssm is not installed
    from mamba_ssm.ops.selective_scan_interface import ...   kernels.scans, in any case: a kernel has no graph

A package that is installed, or lies in the folder of the file, keeps its own files in plain PyTorch, and gets shims for
what these import of kernels.

Only what the user's own files import gets a shim, and what the files of such a package do. A library that asks whether
a package is there, to choose between its kernel and its own code, gets the true answer.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from torch import nn

from moe_export.export.frontend.kernels.refusals import MissingKernel
from moe_export.export.frontend.kernels.table import ANY_DEPTH, KERNELS_BELOW, MODULES
from moe_export.export.frontend.source import is_user_file

_FORMS = "moe_export.export.frontend.kernels"
_PACKAGES = {
    ".".join(parts[:depth])
    for parts in (name.split(".") for name in MODULES)
    for depth in range(1, len(parts) + 1)
}
_ROOTS = {name.partition(".")[0] for name in MODULES}
_given: dict[str, Any] = {}
_called: set[str] = set()


def forget_calls() -> None:
    """What is called from now on belongs to another model."""
    _called.clear()


def note_on_shims(module: nn.Module) -> str | None:
    """What the report says of the shims that a model is made of, or has called since `forget_calls`."""
    kinds = {type(part) for part in module.modules()}
    shortest = {form: name for name, form in sorted(_given.items(), reverse=True) if isinstance(form, type)}
    used = sorted({name for form, name in shortest.items() if form in kinds} | _called)
    return f"plain PyTorch stands in for {', '.join(used)} (docs/recurrence.md)" if used else None


def _give(name: str, form: Any) -> Any:
    """A form as it is handed out: a function notes that it is called."""
    if name not in _given:
        _given[name] = _noting(name, form) if inspect.isfunction(form) else form
    return _given[name]


def _noting(name: str, form: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(form)
    def called(*args: Any, **kwargs: Any) -> Any:
        _called.add(name)
        return form(*args, **kwargs)

    return called


class _KernelShims(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of the table for imports of the user's files, before anybody else does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in _ROOTS or not _asked_by_user(fullname):
            return None
        real = importlib.machinery.PathFinder.find_spec(fullname, path)
        kernel = _is_below(fullname, KERNELS_BELOW)
        if not (kernel and (real or _has_names(fullname))) and (real or fullname not in _PACKAGES):
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        spec.submodule_search_locations = list((real and real.submodule_search_locations) or ())
        spec.loader_state = real is not None
        return spec

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        name, real = module.__name__, bool(module.__spec__.loader_state)
        names = _names_of(name)
        vars(module)["__all__"] = list(names)

        def give(attribute: str) -> Any:
            if attribute in names:
                file, form = names[attribute]
                found = getattr(importlib.import_module(f"{_FORMS}.{file}"), form)
                return _give(f"{name}.{attribute}", found)
            inside = importlib.machinery.PathFinder.find_spec(f"{name}.{attribute}", module.__path__)
            if attribute.startswith("__") or not real or inside:
                raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
            return MissingKernel(f"{name}.{attribute}")

        vars(module)["__getattr__"] = give


def _is_below(name: str, packages: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in packages)


def _has_names(fullname: str) -> bool:
    return fullname in _PACKAGES or _is_below(fullname, ANY_DEPTH)


def _names_of(module: str) -> dict[str, tuple[str, str]]:
    """The names that a module has: the file in which each stands, and its name there."""
    above = next((each for each in ANY_DEPTH if _is_below(module, (each,))), module)
    return {
        name.partition("=")[0]: (file, name.partition("=")[2] or name)
        for file, names in MODULES.get(module, MODULES.get(above, {})).items()
        for name in names
    }


def _asked_by_user(fullname: str) -> bool:
    """Whether the import stands in a file of the user's, or of the package that it imports."""
    own = getattr(sys.modules.get(fullname.partition(".")[0]), "__path__", ())
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith("<frozen importlib") and name not in (__file__, importlib.__file__):
            return is_user_file(name) or any(Path(folder) in Path(name).parents for folder in own)
        frame = frame.f_back
    return False


def install_kernel_shims() -> None:
    """From now on, for the rest of the process: models import lazily."""
    if not any(isinstance(finder, _KernelShims) for finder in sys.meta_path):
        sys.meta_path.insert(0, _KernelShims())
