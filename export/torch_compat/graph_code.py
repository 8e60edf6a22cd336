"""`code_when_called`: the Python code of a traced graph is written and compiled when somebody wants it.

Each pass over a graph ends with `recompile`, which writes all of it as Python once more. Of a trace of many experts
that was up to a tenth of the time, and nobody called the function.

Why: `torch.fx._lazy_graph_module` does the same for modules that are made by its own function, and `torch.export`
makes others.

Seen in torch 2.13.0 (`torch.fx.GraphModule.recompile`); that of 2.14.1 was read and is the same, and not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import fx

# What `recompile` gives a module or its class, and what reads these past the attributes.
_WRITTEN = ("forward", "_code", "_lineno_map", "_prologue_start", "__reduce__", "__reduce_package__")


@contextmanager
def code_when_called() -> Iterator[None]:
    """While it runs, `recompile` only notes that there is new code; a module has it when it is called or read.

    The code is then that of the graph as it is by then, so a graph that is changed after `recompile` must be recompiled
    before it is called, as all passes do.
    """
    recompile: Callable[[fx.GraphModule], Any] = fx.GraphModule.recompile

    def noted(module: fx.GraphModule) -> None:
        codegen = module.graph._codegen
        if isinstance(codegen, fx.graph._PyTreeCodeGen):  # what is asked of a module besides its code
            module._in_spec, module._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
        for name in _WRITTEN:
            vars(module).pop(name, None)
            setattr(type(module), name, _Later(name, recompile))  # each module has a class of its own
        module._recompile_submodules()

    if getattr(recompile, "__module__", None) == __name__:  # inside another one
        yield
        return
    with mock.patch.object(fx.GraphModule, "recompile", noted):
        yield


class _Later:
    """An attribute of a module that is there once its code is written."""

    def __init__(self, name: str, recompile: Callable[[fx.GraphModule], Any]) -> None:
        self._name = name
        self._recompile = recompile

    def __get__(self, module: fx.GraphModule | None, owner: type) -> Any:
        if module is None:
            return self
        for name in _WRITTEN:
            if isinstance(vars(owner).get(name), _Later):
                delattr(owner, name)
        self._recompile(module)
        return getattr(module, self._name)
