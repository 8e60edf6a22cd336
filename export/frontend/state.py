"""What a call of a model changes: counters, caches, tables that grow, running means; saved, compared, put back.

A graph has no memory: every run starts from the state in which the model was loaded. So does every run of the
original here, or the second one could not be compared, and the tracer's symbols would stay behind in the model.

State is whatever a call can reach and write to:

- buffers, and plain attributes of modules and of objects that hang on them, through lists, dicts and sets;
- globals of the user's own files, where caches live (`_TABLES = {}`).

A container is saved by its items, a tensor by a copy of its values. Weights are too large to be copied for good, so
they are copied for the first call alone (`State.of(..., weights=True)`), and those that it changes stay copied.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, MutableSet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_export.export.frontend.source import is_user_file
from moe_export.export.torch_compat.modules import tables_of
from moe_export.export.torch_compat.operators import writes_to
from moe_export.export.weights.lazy import lazy_weight_of

_MOST_WEIGHTS = 2**30  # bytes that the weights may have to be copied for the first call
_BY_VALUE = (
    2**20
)  # bytes up to which a tensor is compared by its values; beyond, by PyTorch's count of writes to it
_GLOBAL = "global"
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True)
class _Items:
    """A container and what was in it.

    Attributes:
        owner: A dict (of attributes, too), list, set or deque.
        where: What a key of it is called in reports.
        items: A shallow copy.
    """

    owner: Any
    where: Callable[[Any], str]
    items: Any

    def differing(self) -> Iterator[str]:
        """What is no longer the same object, or the same plain value."""
        now = _indexed(self.owner)
        then = _indexed(self.items)
        for key in {**then, **now}:
            if key not in now or key not in then or not _is(now[key], then[key]):
                yield self.where(key)

    def restore(self) -> None:
        """Put the items back, into the same container."""
        if all(False for _ in self.differing()):
            return
        if isinstance(self.owner, (dict, MutableSet)):
            self.owner.clear()
            self.owner.update(self.items)  # type: ignore[union-attr]  # what has `clear` here has `update`
        else:
            self.owner.clear()
            self.owner.extend(self.items)


@dataclass(frozen=True)
class _Values:
    """A tensor and what was in it."""

    tensor: torch.Tensor
    where: str
    copy: torch.Tensor | None
    writes: int
    address: int

    def differs(self) -> bool:
        """Whether it was written to, or moved."""
        if _address(self.tensor) != self.address or writes_to(self.tensor) != self.writes:
            return self.copy is None or not _same(self.tensor, self.copy)
        by_value = self.copy is not None and self.copy.nbytes <= _BY_VALUE
        return by_value and self.copy is not None and not _same(self.tensor, self.copy)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back."""
        if self.copy is None or not self.differs():
            return
        if self.tensor.shape == self.copy.shape and self.tensor.dtype == self.copy.dtype:
            self.tensor.detach().copy_(self.copy)
        else:
            self.tensor.data = self.copy.clone()


@dataclass(frozen=True)
class State:
    """The state of a model at one moment."""

    _items: tuple[_Items, ...]
    _values: tuple[_Values, ...]
    _weights: tuple[_Values, ...] = ()
    _namespaces: tuple[tuple[str, dict[str, Any]], ...] = ()

    @staticmethod
    def of(module: nn.Module, *, weights: bool = False) -> State:
        """Save the state of a model, but for globals.

        Args:
            module: The model.
            weights: Whether to copy its parameters, too.
        """
        walk = _Walk()
        walk.see(module, "", "")
        nbytes = sum(weight.nbytes for weight, _ in walk.weights)
        copied = weights and nbytes <= _MOST_WEIGHTS
        saved = (
            tuple(_saved(weight, where, copied=copied) for weight, where in walk.weights) if weights else ()
        )
        return State(tuple(walk.items), tuple(walk.values), saved, _namespaces(module))

    def with_globals(self) -> State:
        """The same, and globals as they are now: whose they are may change them between two calls."""
        walk = _Walk()
        for file, namespace in self._namespaces:
            walk.see_globals(file, namespace)
        return replace(
            self, _items=(*self._items, *walk.items), _values=(*self._values, *walk.values), _namespaces=()
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
        return frozenset([*items, *values])

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

    items: list[_Items] = field(default_factory=list)
    values: list[_Values] = field(default_factory=list)
    weights: list[tuple[torch.Tensor, str]] = field(default_factory=list)
    # Python's own tables, which a file may have under a name of its own: a module that is put back there is lost.
    _seen: dict[int, Any] = field(
        default_factory=lambda: {id(table): table for table in (sys.modules, sys.path_importer_cache)}
    )

    def see(self, value: Any, path: str, kind: str) -> None:
        """Save what can change of a value, and of what it holds."""
        if isinstance(value, _PLAIN) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            self._see_tensor(value, f"{kind} {path}")
        elif isinstance(value, nn.Module):
            if kind != _GLOBAL:
                self._see_module(value, path)
        elif isinstance(value, dict):
            self._see_items(value, lambda key: f"{kind} {path}[{key!r}]")
            for key, item in value.items():
                self.see(item, f"{path}[{key!r}]", kind)
        elif isinstance(value, (list, deque, set)):
            self._see_items(value, lambda _: f"{kind} {path}")
            for index, item in enumerate(value):
                self.see(item, f"{path}[{index}]", kind)
        elif isinstance(value, (tuple, frozenset)):
            for index, item in enumerate(value):
                self.see(item, f"{path}[{index}]", kind)
        elif kind != _GLOBAL and _holds_state(value):
            self._see_items(vars(value), lambda key: f"{kind} {path}.{key}")
            for key, item in vars(value).items():
                self.see(item, f"{path}.{key}", kind)

    def see_globals(self, file: str, namespace: dict[str, Any]) -> None:
        """Save the values and the containers among the globals of a file; what has a life of its own is left alone."""
        simple = {
            name: value
            for name, value in namespace.items()
            if not name.startswith("__")
            and isinstance(value, (*_PLAIN, torch.Tensor, dict, list, set, deque))
        }
        self.items.append(_Globals(namespace, lambda key: f"global {key} of {file}", simple))
        for name, value in simple.items():
            self.see(value, f"{name} of {file}", _GLOBAL)

    def _see_module(self, module: nn.Module, path: str) -> None:
        start = f"{path}." if path else ""
        self._see_items(vars(module), lambda key: f"attribute {start}{key}")
        tables = {id(table): kind for kind, table in tables_of(module).items()}
        for key, value in vars(module).items():
            if id(value) in tables:
                self._see_table(value, start, tables[id(value)])
            elif "_hooks" not in key:
                self.see(value, f"{start}{key}", "attribute")

    def _see_table(self, table: dict[str, Any], start: str, kind: str) -> None:
        self._see_items(table, lambda key: f"{kind} {start}{key}")
        for name, value in table.items():
            self.see(value, f"{start}{name}", "attribute" if kind == "module" else kind)

    def _see_items(self, owner: Any, where: Callable[[Any], str]) -> None:
        if isinstance(owner, dict):
            self.items.append(_Items(owner, where, dict(dict.items(owner))))
        else:
            self.items.append(_Items(owner, where, set(owner) if isinstance(owner, set) else list(owner)))

    def _see_tensor(self, tensor: torch.Tensor, where: str) -> None:
        if tensor.is_meta or tensor.layout is not torch.strided or lazy_weight_of(tensor) is not None:
            return
        if isinstance(tensor, nn.Parameter):
            self.weights.append((tensor, where))
        else:
            self.values.append(_saved(tensor, where, copied=True))


@dataclass(frozen=True)
class _Globals(_Items):
    """Globals of a file: of what it defines, only those that were saved, and what is new, are looked at."""

    def differing(self) -> Iterator[str]:
        for name, value in self.items.items():
            if name not in self.owner or not _is(self.owner[name], value):
                yield self.where(name)

    def restore(self) -> None:
        for name, value in self.items.items():
            if name not in self.owner or not _is(self.owner[name], value):
                self.owner[name] = value


def _namespaces(module: nn.Module) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The globals of the user's files that a model's code lies in, by file."""
    found: dict[str, dict[str, Any]] = {}
    for kind in {base for part in module.modules() for base in type(part).__mro__}:
        forward = vars(kind).get("forward")
        if isinstance(forward, types.FunctionType) and is_user_file(forward.__code__.co_filename):
            found[forward.__code__.co_filename] = forward.__globals__
    for other in list(sys.modules.values()):
        file = getattr(other, "__file__", None)
        if isinstance(other, types.ModuleType) and isinstance(file, str) and is_user_file(file):
            found.setdefault(file, vars(other))
    return tuple((Path(file).name, found[file]) for file in sorted(found))


def _holds_state(value: Any) -> bool:
    """Whether it is an object of somebody's class, with attributes; not one of Python's or PyTorch's own machinery."""
    if isinstance(value, types.SimpleNamespace):
        return True
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType))
        and package not in sys.stdlib_module_names
        and package not in {"torch", "numpy"}
    )


def _saved(tensor: torch.Tensor, where: str, *, copied: bool) -> _Values:
    copy = tensor.detach().clone() if copied else None
    return _Values(tensor, where, copy, writes_to(tensor), _address(tensor))


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return 0


def _indexed(owner: Any) -> dict[Any, Any]:
    if isinstance(owner, dict):  # what is stored, not what a class of its own makes of it when it is asked
        return owner if type(owner).__getitem__ is dict.__getitem__ else dict(dict.items(owner))
    if isinstance(owner, MutableSet):
        return {id(item): item for item in owner}
    return dict(enumerate(owner))


def _is(now: Any, then: Any) -> bool:
    return now is then or (type(now) is type(then) and isinstance(now, _PLAIN) and now == then)


def _same(now: torch.Tensor, then: torch.Tensor) -> bool:
    if now.shape != then.shape or now.dtype != then.dtype:
        return False
    # Bit for bit, so that a NaN equals itself.
    return torch.equal(*(_bits(tensor) for tensor in (now, then)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
