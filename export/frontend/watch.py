"""`Watch`: the calls that a script makes while it runs, and which of them ends it.

    traced = torch.jit.trace(model, x)                 goes on with the model itself: an exporter may be given it
    torch.onnx.export(traced, x, "m.onnx", ...)        ends the script, and is what it asks for

A script that is listed (`--list`), or of which a later call is picked (`--call 2`), goes on behind every call with a
stand-in for what the call would have returned.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from moe_export.export.frontend.export_calls import (
    LAST,
    NOTHING,
    Asked,
    Exported,
    Made,
    calls_a_door,
    exports,
    read,
)
from moe_export.export.frontend.source import is_user_file
from moe_export.export.torch_compat.export_calls import COMPILED
from moe_export.export.torch_compat.nesting import pytree

_MOST = 1000
"""Calls that are listed at most: a loop over data makes one after the other."""


@dataclass(frozen=True)
class Call:
    """An export call of a script, or an outermost call of a module in it.

    Attributes:
        exporter: What it exports with, `torch.onnx.export`; None of a call of the module.
        asked: What an export call asks for besides.
        where: The user's line, `file:line`.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    exporter: str | None = None
    asked: Asked = NOTHING
    where: str | None = None

    @property
    def shapes(self) -> tuple[str, ...]:
        """`float32[2, 10, 64]` of each tensor among the arguments, in order."""
        return tuple(
            f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
            for leaf in pytree.tree_leaves((self.args, self.kwargs))
            if isinstance(leaf, torch.Tensor)
        )


class CallSeen(BaseException):
    """Ends a script at a call. No `Exception`, so that `except Exception` lets it pass."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


@dataclass
class Watch:
    """What was called so far, and what to do at the next call.

    Attributes:
        source: The script's text.
        ends: Whether the first call of a module ends a script that exports nothing.
        every: Whether every call is noted, and none ends the script but `pick`.
        pick: The number of the call, from 1, that ends it.
        names_model: Whether the script itself says which model it means: then a part that is traced is a part.
        namespace: The script's globals.
        calls: In order.
        compiled: What is to be compiled for TensorRT when it is called.
        files: What the exports were to write.
    """

    source: bytes
    ends: bool
    every: bool = False
    pick: int | None = None
    names_model: bool = False
    namespace: Mapping[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    compiled: list[nn.Module] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    _inside: bool = False

    def on_export(self, name: str, given: dict[str, Any]) -> Any:
        """An exporter is called; what it returns, NotImplemented if it is to do its work."""
        found = read(given)
        if found is None:
            return NotImplemented
        call = Call(*found[:3], name, found[3], _users_line())
        self._note(call)
        goes_on = self.every or (self.names_model and name.startswith("torch.jit."))
        if not goes_on and (name in LAST or name == COMPILED or not self._exports(LAST)):
            raise CallSeen(call)
        if isinstance(given.get("f"), (str, os.PathLike)):
            self.files.append(os.fspath(given["f"]))
        if name.startswith("torch.jit."):
            return given.get("func", given.get("mod"))
        return Exported(found) if name.startswith("torch.export.") else Made()

    def on_module(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A module is called."""
        if self._inside:
            return original(module, *args, **kwargs)
        wanted = any(module is each for each in self.compiled)
        if self.every or wanted or not self.calls:
            call = Call(module, args, kwargs, _TENSORRT if wanted else None, NOTHING, _users_line())
            if not any(_is_again(call, each) for each in self.calls[-_MOST:]):
                self._note(call)
            if not self.every and (wanted or (self.ends and not self._exports())):
                raise CallSeen(call)
        self._inside = True
        try:
            return original(module, *args, **kwargs)
        finally:
            self._inside = False

    @property
    def found(self) -> Call | None:
        """The call that the script asks for, if nothing ended it: an export before a call of a module."""
        return next((call for call in self.calls if call.exporter), self.calls[0] if self.calls else None)

    def _note(self, call: Call) -> None:
        self.calls.append(call)
        if self.pick == len(self.calls):
            raise CallSeen(call)

    def _exports(self, names: frozenset[str] | None = None) -> bool:
        """Whether an exporter may be yet to come: in the script, or in a function that it calls."""
        if exports(self.source) if names is None else exports(self.source, names):
            return True
        if self.compiled:
            return names is None
        functions = {value for value in self.namespace.values() if inspect.isfunction(value)}
        reached = (value for value in functions if value.__name__ in _names(self.source))
        return any(calls_a_door(function) for function in reached)


_TENSORRT = f'{COMPILED}(backend="tensorrt")'


def _is_again(call: Call, earlier: Call) -> bool:
    """Whether a module is called once more in the same way, in a loop."""
    same = earlier.exporter == call.exporter and earlier.module is call.module
    return same and earlier.shapes == call.shapes


def _names(source: bytes) -> frozenset[str]:
    """Names that a script's code uses, in whatever scope."""
    found: set[str] = set()
    stack: list[CodeType] = [compile(source, "<script>", "exec", dont_inherit=True)]
    while stack:
        code = stack.pop()
        found |= set(code.co_names)
        stack += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(found)


def _users_line() -> str | None:
    """The innermost line of the user's that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_user_file(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return None
