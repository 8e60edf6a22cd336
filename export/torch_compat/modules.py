"""What `nn.Module` keeps under private names, and calls and lookups of modules that are seen or answered.

- `calls_of_modules`, `conversions`: a patch of `nn.Module.__call__` and of `nn.Module.to`. Why: PyTorch's public hook
  for all modules (`register_module_forward_pre_hook`) is not given the keyword arguments of a call, and none is called
  for `to`.
- `lookups`: a patch of `__getitem__` of `nn.ModuleList` and `nn.Sequential`. Why: they make a Python integer of what
  they are looked up by, and have no hook.
- `compiled_inside`: what `torch.compile` was given, and `module.compile()` taken back. Why: neither can be asked.
- `tables_of`: the dicts of parameters, buffers and submodules themselves. Why: `named_parameters` and its like give
  what is in them, and a dict can only be put back as it was by who holds it.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import nn

Original = Callable[..., Any]


@contextmanager
def calls_of_modules(seen: Callable[..., Any]) -> Iterator[None]:
    """While it runs, a call of a module is one of `seen(original, module, *args, **kwargs)`."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return seen(original, module, *args, **kwargs)

    with mock.patch.object(nn.Module, "__call__", call):
        yield


@contextmanager
def conversions(to: Callable[..., nn.Module]) -> Iterator[None]:
    """While it runs, `module.to(...)` is `to(original, module, ...)`."""
    original = nn.Module.to

    def convert(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return to(original, module, *args, **kwargs)

    with mock.patch.object(nn.Module, "to", convert):
        yield


@contextmanager
def lookups(instead: Callable[[nn.ModuleList | nn.Sequential, Any], Any]) -> Iterator[None]:
    """While it runs, `modules[index]` is `instead(modules, index)`, and as ever where that is None."""

    def answered(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def item(modules: Any, index: Any) -> Any:
            found = None if isinstance(index, (int, slice)) else instead(modules, index)
            return original(modules, index) if found is None else found

        return item

    with ExitStack() as stack:
        for owner in (nn.ModuleList, nn.Sequential):
            stack.enter_context(mock.patch.object(owner, "__getitem__", answered(owner.__getitem__)))
        yield


def compiled_inside(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` was given to make this one; None if this one is not compiled so."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def uncompile(module: nn.Module) -> None:
    """Take back `module.compile()`, which compiles in place."""
    module._compiled_call_impl = None


def tables_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The module's own dicts: `parameter`, `buffer`, `module`."""
    return {
        "parameter": module._parameters,
        "buffer": module._buffers,
        "module": module._modules,
    }
