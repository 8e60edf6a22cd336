"""`export_calls`: what a script hands to an exporter is seen at the exporter's door.

A patch of `torch.onnx.export`, `torch.export.export`, `torch.export.draft_export`, `torch.jit.trace`,
`torch.jit.trace_module`, `torch.jit.script`, of what goes on with a trace (`torch.jit.freeze`, `torch.jit.save`), of
`torch.compile` for TensorRT, and of torch_tensorrt's entry points once a script imports it. Names of former versions
(`torch.onnx.dynamo_export`) are there again. Why: none of them can be observed, and each fails on models that go into a
graph here.

Seen in torch 2.13.0 and 2.14.1. What torch_tensorrt has is taken from its documentation; it was not run.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.export
import torch.jit
import torch.onnx

Seen = Callable[[str, dict[str, Any]], Any]
"""Given an exporter's name and its arguments by their names, what the call returns; NotImplemented to run it."""

EXPORTERS: dict[str, tuple[Any, str]] = {
    "torch.onnx.export": (torch.onnx, "export"),
    "torch.export.export": (torch.export, "export"),
    "torch.export.draft_export": (torch.export, "draft_export"),
    "torch.jit.trace": (torch.jit, "trace"),
    "torch.jit.trace_module": (torch.jit, "trace_module"),
}
"""Each takes a model and its arguments: where it stands, and its name there."""
TENSORRT: tuple[str, ...] = (
    "torch_tensorrt.compile",
    "torch_tensorrt.convert_method_to_trt_engine",
    "torch_tensorrt.dynamo.compile",
    "torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine",
)
"""The same of a package that is patched when it is imported."""
FORMER: tuple[str, ...] = ("torch.onnx.dynamo_export",)
"""Exporters of former versions."""
COMPILED = "torch.compile"
"""What compiles a module for TensorRT as one of its backends."""
STEPS = ("torch.export.export", "torch.export.draft_export", "torch.jit.trace", "torch.jit.trace_module")
"""Exporters whose result often goes to another one."""
_BACKENDS = ("tensorrt", "torch_tensorrt", "aot_torch_tensorrt_aten")


@contextmanager
def export_calls(seen: Seen, compiled: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """While it runs, a call of an exporter first tells `seen` its name and its arguments by their names.

    `torch.jit.script` is given no arguments of the model, and so gives a model back as it is, as freezing does.

    Args:
        seen: Told of each call.
        compiled: Told of each module that `torch.compile` is to give to TensorRT when it is called.
    """
    with ExitStack() as stack:
        for name, (owner, attribute) in EXPORTERS.items():
            door = _door(name, getattr(owner, attribute), seen)
            stack.enter_context(mock.patch.object(owner, attribute, door))
        for name in ("script", "freeze", "optimize_for_inference", "save"):
            stack.enter_context(mock.patch.object(torch.jit, name, _passes_modules(getattr(torch.jit, name))))
        stack.enter_context(mock.patch.object(torch, "compile", _compile(torch.compile, seen, compiled)))
        stack.enter_context(
            mock.patch.object(
                torch.nn.Module, "compile", _compile_in_place(torch.nn.Module.compile, compiled)
            )
        )
        former = {"dynamo_export": _dynamo_export(seen), "ExportOptions": SimpleNamespace}
        for name, value in former.items():
            if not hasattr(torch.onnx, name):
                stack.enter_context(mock.patch.object(torch.onnx, name, value, create=True))
        stack.enter_context(_when_imported(seen))
        yield


def is_door(value: Any) -> bool:
    """Whether it is an exporter as it is patched here."""
    return getattr(value, "__exporter__", None) is not None


def _marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    function.__exporter__ = name  # type: ignore[attr-defined]
    return function


def _door(name: str, original: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    signature = inspect.signature(original)
    more = next((each.name for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD), None)

    def export(*args: Any, **kwargs: Any) -> Any:
        bound = _bound(signature, args, kwargs)
        if bound is None:  # the exporter's own error says more
            return original(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        given = {**(given.pop(more) if more else {}), **given}
        answer = seen(name, given)
        return original(*args, **kwargs) if answer is NotImplemented else answer

    return _marked(name, export)


def _bound(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments | None:
    """The arguments by their names; those of former versions, which this one refuses, are left out."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    count = sum(each.kind in positional for each in signature.parameters.values())
    try:
        return signature.bind(*args, **kwargs)
    except TypeError:
        known = {name: value for name, value in kwargs.items() if name in signature.parameters}
    try:
        return signature.bind(*args[:count], **known)
    except TypeError:
        return None


def _passes_modules(original: Callable[..., Any]) -> Callable[..., Any]:
    def passed(obj: Any, *args: Any, **kwargs: Any) -> Any:
        plain = isinstance(obj, torch.nn.Module) and not isinstance(obj, torch.jit.ScriptModule)
        return obj if plain else original(obj, *args, **kwargs)

    return passed


def _dynamo_export(seen: Seen) -> Callable[..., Any]:
    def dynamo_export(model: Any, /, *args: Any, export_options: Any = None, **kwargs: Any) -> Any:
        return seen("torch.onnx.dynamo_export", {"model": model, "args": args, "kwargs": kwargs})

    return _marked("torch.onnx.dynamo_export", dynamo_export)


def _compile(
    original: Callable[..., Any], seen: Seen, compiled: Callable[[torch.nn.Module], None]
) -> Callable[..., Any]:
    def compile_(model: Any = None, **options: Any) -> Any:
        if options.get("backend") not in _BACKENDS:
            return original(model, **options)
        if model is None:
            return lambda function: compile_(function, **options)
        if isinstance(model, torch.nn.Module):
            compiled(model)
            return model

        def called(*args: Any, **kwargs: Any) -> Any:
            answer = seen(COMPILED, {"func": model, "args": args, "kwargs": kwargs})
            return model(*args, **kwargs) if answer is NotImplemented else answer

        return called

    return compile_


def _compile_in_place(
    original: Callable[..., Any], compiled: Callable[[torch.nn.Module], None]
) -> Callable[..., Any]:
    def compile_(self: torch.nn.Module, *args: Any, **options: Any) -> None:
        if options.get("backend") in _BACKENDS:
            compiled(self)
        else:
            original(self, *args, **options)

    return compile_


class _Patching(importlib.abc.MetaPathFinder):
    """Finds torch_tensorrt's modules as the others do, and patches each behind its execution."""

    def __init__(self, seen: Seen, stack: ExitStack) -> None:
        self.seen, self.stack = seen, stack

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in {name.rpartition(".")[0] for name in TENSORRT}:
            return None
        found = (each.find_spec(fullname, path, target) for each in sys.meta_path if each is not self)
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.patch(module)

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010  a method of this loader alone
        return spec

    def patch(self, module: ModuleType) -> None:
        """Put doors in front of the entry points of a module."""
        for name in TENSORRT:
            owner, _, attribute = name.rpartition(".")
            original = getattr(module, attribute, None)
            if owner == module.__name__ and callable(original):
                door = _door(name, original, self.seen)
                self.stack.enter_context(mock.patch.object(module, attribute, door))


@contextmanager
def _when_imported(seen: Seen) -> Iterator[None]:
    with ExitStack() as stack:
        finder = _Patching(seen, stack)
        for name in {name.rpartition(".")[0] for name in TENSORRT} & sys.modules.keys():
            finder.patch(sys.modules[name])
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
