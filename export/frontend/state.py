"""What a call of a model changes: counters, caches, tables that grow, running means; saved, compared, put back.

A graph has no memory: every run starts from the state in which the model was loaded. So does every run of the
original here, or the second one could not be compared, and the tracer's symbols would stay behind in the model.

State is whatever a call can reach and write to:

- buffers, and plain attributes of modules and of objects that hang on them, through lists, dicts and sets;
- globals of the user's own files that the model's code can reach, where caches live (`_TABLES = {}`), and attributes
  of the model's classes;
- variables of the functions around a function there (a decorator's table), and mutable defaults.

A container is saved by its items, a tensor by a copy of its values. Weights are too large to be copied for good, so
they are copied for the first call alone (`State.of(..., weights=True)`), and those that it changes stay copied.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_export.export.frontend.model_files import names_reached
from moe_export.export.frontend.saved import (
    PLAIN,
    Globals,
    Items,
    OfClass,
    OfFunction,
    Values,
    held_by,
    indexed,
    is_simple,
    saved_values,
)
from moe_export.export.frontend.source import is_installed, is_own_file
from moe_export.export.torch_compat.modules import tables_of
from moe_export.export.weights.lazy import lazy_weight_of

_MOST_WEIGHTS = 2**30  # bytes that the weights may have to be copied for the first call
_GLOBAL = "global"
LIBRARY = "library global"
_CLASS = "class attribute"
_VARIABLE = "variable"
_SHARED = (_GLOBAL, LIBRARY, _CLASS, _VARIABLE)  # what others than the model may hold, too
_INTERNAL = "internal"
_OF_MODULES = frozenset(
    vars(nn.Module())
)  # PyTorch's own tables in a module, which are told of by what is in them


@dataclass(frozen=True)
class State:
    """The state of a model at one moment."""

    _items: tuple[Items, ...]
    _values: tuple[Values, ...]
    _weights: tuple[Values, ...] = ()
    _namespaces: tuple[tuple[str, dict[str, Any]], ...] = ()
    _classes: tuple[type, ...] = ()

    @staticmethod
    def of(module: nn.Module, *, weights: bool = False, values: bool = True) -> State:
        """Save the state of a model, but for globals.

        Args:
            module: The model.
            weights: Whether to copy its parameters, too.
            values: Whether to copy tensors; without them, only what is held where is saved.
        """
        walk = _Walk(copies=values)
        walk.see(module, "", "")
        if not values:
            return State(tuple(walk.items), ())
        nbytes = sum(weight.nbytes for weight, _ in walk.weights)
        copied = weights and nbytes <= _MOST_WEIGHTS
        saved = (
            tuple(saved_values(weight, where, copied=copied) for weight, where in walk.weights)
            if weights
            else ()
        )
        return State(
            tuple(walk.items), tuple(walk.values), saved, _namespaces(module, walk.held), _classes(module)
        )

    def with_globals(self) -> State:
        """The same, and globals as they are now: whose they are may change them between two calls."""
        walk = _Walk()
        for file, namespace in self._namespaces:
            kind = LIBRARY if is_installed(file) else _GLOBAL
            walk.see_globals(Path(file).name, namespace, kind)
        for each in self._classes:
            walk.see_class(each)
        return replace(
            self,
            _items=(*self._items, *walk.items),
            _values=(*self._values, *walk.values),
            _namespaces=(),
            _classes=(),
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put everything back afterwards."""
        before = self.with_globals()
        try:
            yield
        finally:
            before.restore()

    def changed(self) -> frozenset[str]:
        """What is no longer as it was: `buffer total`, `attribute rope.length`, `global _TABLES of model.py`."""
        items = (where for saved in self._items for where in saved.differing())
        values = (saved.where for saved in (*self._values, *self._weights) if saved.differs())
        return frozenset(where for where in (*items, *values) if not where.startswith(_INTERNAL))

    def replace_dicts(self, make: Callable[[dict[Any, Any]], dict[Any, Any]]) -> None:
        """Let others stand in the place of the dicts that the model keeps, made of them; inside of `kept`."""
        slots = [
            (saved, key, value)
            for saved in self.with_globals()._items
            for key, value in indexed(saved.items).items()
            if type(value) is dict and key not in _OF_MODULES
        ]
        made = {id(value): make(value) for _, _, value in slots}
        for saved, key, value in slots:
            owner = made.get(id(saved.owner))
            if owner is None:
                saved.put(key, made[id(value)])
            else:
                dict.__setitem__(owner, key, made[id(value)])

    def restore(self) -> None:
        """Put the same objects back, with the values that they had."""
        for items in self._items:
            items.restore()
        for values in (*self._values, *self._weights):
            values.restore()

    def lasting(self) -> State:
        """The state without copies of weights that are as they were."""
        return replace(self, _weights=tuple(saved for saved in self._weights if saved.differs()))

    def like(self, module: nn.Module) -> State:
        """The state of a copy of the model, with its weights where a call writes into them."""
        return State.of(module, weights=bool(self._weights))

    def lost(self) -> frozenset[str]:
        """Weights that are no longer what they were, and too large to have been copied."""
        return frozenset(saved.where for saved in self._weights if saved.copy is None and saved.differs())


@dataclass
class _Walk:
    """Everything that can be reached, each once."""

    items: list[Items] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    weights: list[tuple[torch.Tensor, str]] = field(default_factory=list)
    copies: bool = True
    held: list[Any] = field(default_factory=list)  # functions, and objects of all kinds
    # Python's own tables, which a file may have under a name of its own: a module that is put back there is lost.
    _seen: dict[int, Any] = field(
        default_factory=lambda: {id(table): table for table in (sys.modules, sys.path_importer_cache)}
    )

    def see(self, value: Any, path: str, kind: str) -> None:
        """Save what can change of a value, and of what it holds."""
        if isinstance(value, PLAIN) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            self._see_tensor(value, f"{kind} {path}")
        elif isinstance(value, nn.Module):
            if kind not in _SHARED:
                self._see_module(value, path)
        elif isinstance(value, dict):
            self._see_items(value, lambda key: f"{kind} {path}[{key!r}]")
            for key, item in dict.items(value):  # what it holds, not what a class of its own would make of it
                self.see(item, f"{path}[{key!r}]", kind)
        elif isinstance(value, (list, deque, set)):
            self._see_items(value, lambda _: f"{kind} {path}")
            for index, item in enumerate(value):
                self.see(item, f"{path}[{index}]", kind)
        elif isinstance(value, (tuple, frozenset)):
            for index, item in enumerate(value):
                self.see(item, f"{path}[{index}]", kind)
        elif kind not in _SHARED:
            self.held.append(value)
            if _holds_state(value):
                self._see_items(vars(value), lambda key: f"{kind} {path}.{key}")
                for key, item in vars(value).items():
                    self.see(item, f"{path}.{key}", kind)

    def see_globals(self, file: str, namespace: dict[str, Any], kind: str) -> None:
        """Save the values and the containers among the globals of a file; what has a life of its own is left alone."""
        simple = {name: value for name, value in namespace.items() if is_simple(name, value)}
        self.items.append(Globals(namespace, lambda key: f"{kind} {key} of {file}", simple))
        for name, value in simple.items():
            self.see(value, f"{name} of {file}", kind)
        if kind == _GLOBAL:
            for value in list(namespace.values()):
                self._see_function(value)

    def see_class(self, kind: type) -> None:
        """Save the values and the containers among the attributes of a class, and the defaults of its methods."""
        simple = {name: value for name, value in vars(kind).items() if is_simple(name, value)}
        self.items.append(OfClass(kind, lambda key: f"{_CLASS} {kind.__qualname__}.{key}", simple))
        for name, value in simple.items():
            self.see(value, f"{kind.__qualname__}.{name}", _CLASS)
        for value in vars(kind).values():
            self._see_function(getattr(value, "__func__", value))

    def _see_function(self, value: Any) -> None:
        """Save what a function of somebody's holds, and the functions around which it is written."""
        if (
            not isinstance(value, types.FunctionType)
            or id(value) in self._seen
            or _is_machinery(value.__module__ or "")
        ):
            return
        self._seen[id(value)] = value
        # What stands in the place of a function while a model is traced keeps what it learned of it.
        held = {} if is_own_file(value.__code__.co_filename) else held_by(value)
        if held:
            name = value.__qualname__
            self.items.append(OfFunction(value, lambda key: f"variable {key} of {name}", held))
        for key, item in held.items():
            self.see(item, f"{key} of {value.__qualname__}", _VARIABLE)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                self._see_function(cell.cell_contents)

    def _see_module(self, module: nn.Module, path: str) -> None:
        start = f"{path}." if path else ""
        self._see_items(vars(module), lambda key: f"attribute {start}{key}")
        tables = {id(table): kind for kind, table in tables_of(module).items()}
        for key, value in vars(module).items():
            if id(value) in tables:
                self._see_table(value, start, tables[id(value)])
            elif "_hooks" in key:
                self.held += value.values() if isinstance(value, dict) else ()
            else:
                self.see(value, f"{start}{key}", _INTERNAL if key in _OF_MODULES else "attribute")

    def _see_table(self, table: dict[str, Any], start: str, kind: str) -> None:
        self._see_items(table, lambda key: f"{kind} {start}{key}")
        for name, value in table.items():
            self.see(value, f"{start}{name}", "attribute" if kind == "module" else kind)

    def _see_items(self, owner: Any, where: Callable[[Any], str]) -> None:
        if isinstance(owner, dict):
            self.items.append(Items(owner, where, dict(dict.items(owner))))
        else:
            self.items.append(Items(owner, where, set(owner) if isinstance(owner, set) else list(owner)))

    def _see_tensor(self, tensor: torch.Tensor, where: str) -> None:
        if (
            not self.copies
            or tensor.is_meta
            or tensor.layout is not torch.strided
            or lazy_weight_of(tensor) is not None
        ):
            return
        if isinstance(tensor, nn.Parameter):
            self.weights.append((tensor, where))
        else:
            self.values.append(saved_values(tensor, where, copied=True))


_LIBRARIES = frozenset({"torch", "numpy", "onnx", "onnx_ir", "onnxruntime"})
_OUR_MODELS = "moe_export.models"


def _classes(module: nn.Module) -> tuple[type, ...]:
    """The classes of a model's modules that somebody wrote: neither Python's nor PyTorch's."""
    kinds = {base: None for part in module.modules() for base in type(part).__mro__}
    return tuple(kind for kind in kinds if not _is_machinery(kind.__module__))


def _namespaces(module: nn.Module, held: Iterable[Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The globals of the user's files that a call can reach, by file.

    Args:
        module: The model.
        held: The functions and objects that it keeps.
    """
    reached = names_reached([*map(type, module.modules()), *held])
    return tuple(
        (file, names)
        for file, names in sorted(reached.items())
        if not _is_machinery(str(names.get("__name__", "")))
    )


def _holds_state(value: Any) -> bool:
    """Whether it is an object of somebody's class, with attributes; not one of Python's or PyTorch's own machinery."""
    if isinstance(value, types.SimpleNamespace):
        return True
    kind = type(value)
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType))
        and not _is_machinery(kind.__module__)
    )


def _is_machinery(module: str) -> bool:
    """Whether a module is Python's, PyTorch's, NumPy's, ONNX's or of this package: it remembers no state of a model.

    A program that was exported before may be a global of the user's file, as in a notebook, and holds all that was
    saved for it.
    """
    package = module.partition(".")[0]
    if package == "moe_export":
        return not module.startswith(_OUR_MODELS)
    return package in sys.stdlib_module_names or package in _LIBRARIES
