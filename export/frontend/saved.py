"""What stands somewhere at one moment, and whether it still does: containers, globals, attributes of classes, tensors.

Each is saved, compared and put back by itself; `state` finds them in a model.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator, MutableSet
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch

from moe_export.export.torch_compat.operators import writes_to

_BY_VALUE = (
    2**20
)  # bytes up to which a tensor is compared by its values; beyond, by PyTorch's count of writes to it
PLAIN = (bool, int, float, complex, str, bytes, type(None))
CONTAINERS = (dict, list, set, deque)


@dataclass(frozen=True)
class Items:
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
        if _untouched(self.owner, self.items):
            return
        now = indexed(self.owner)
        then = indexed(self.items)
        for key in {**then, **now}:
            if key not in now or key not in then or not _is(now[key], then[key]):
                yield self.where(key)

    def put(self, key: Any, value: Any) -> None:
        """Store something else under a key."""
        self.owner[key] = value

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
class Values:
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
class Globals(Items):
    """Globals of a file: of what it defines, only those that were saved, and what is new, are looked at."""

    def differing(self) -> Iterator[str]:
        for name, value in self.items.items():
            if name not in self.owner or not _is(self.owner[name], value):
                yield self.where(name)

    def restore(self) -> None:
        for name, value in self.items.items():
            if name not in self.owner or not _is(self.owner[name], value):
                self.owner[name] = value


@dataclass(frozen=True)
class OfClass(Items):
    """Attributes of a class, which only `setattr` writes."""

    def differing(self) -> Iterator[str]:
        now = {name: value for name, value in vars(self.owner).items() if is_simple(name, value)}
        for name in {**self.items, **now}:
            if name not in now or name not in self.items or not _is(now[name], self.items[name]):
                yield self.where(name)

    def put(self, key: Any, value: Any) -> None:
        setattr(self.owner, key, value)

    def restore(self) -> None:
        for name, value in self.items.items():
            if not _is(vars(self.owner).get(name, self), value):
                setattr(self.owner, name, value)
        for name in [each for each, value in vars(self.owner).items() if is_simple(each, value)]:
            if name not in self.items:
                delattr(self.owner, name)


@dataclass(frozen=True)
class OfFunction(Items):
    """What a function holds from call to call: variables of a function around it, and mutable defaults."""

    def differing(self) -> Iterator[str]:
        now = held_by(self.owner)
        for name in self.items:
            if name not in now or not _is(now[name], self.items[name]):
                yield self.where(name)

    def put(self, key: Any, value: Any) -> None:
        function = self.owner
        if key in function.__code__.co_freevars:
            function.__closure__[function.__code__.co_freevars.index(key)].cell_contents = value
        else:
            place = _with_defaults(function).index(key)
            function.__defaults__ = (
                *function.__defaults__[:place],
                value,
                *function.__defaults__[place + 1 :],
            )

    def restore(self) -> None:
        now = held_by(self.owner)
        for name, value in self.items.items():
            if name not in now or not _is(now[name], value):
                self.put(name, value)


def held_by(function: types.FunctionType) -> dict[str, Any]:
    """Variables of the functions around one, and its mutable defaults, by name."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # nothing was assigned to it yet
            continue
    variables = {name: value for name, value in found.items() if is_simple(name, value)}
    defaults = zip(_with_defaults(function), function.__defaults__ or (), strict=True)
    return variables | {name: value for name, value in defaults if isinstance(value, CONTAINERS)}


def _with_defaults(function: types.FunctionType) -> list[str]:
    code, count = function.__code__, len(function.__defaults__ or ())
    return list(code.co_varnames[code.co_argcount - count : code.co_argcount])


def is_simple(name: str, value: Any) -> bool:
    """Whether a global or an attribute of a class may be state: no function, class or object with a life of its own."""
    return not name.startswith("__") and isinstance(value, (*PLAIN, torch.Tensor, *CONTAINERS))


def saved_values(tensor: torch.Tensor, where: str, *, copied: bool) -> Values:
    copy = tensor.detach().clone() if copied else None
    return Values(tensor, where, copy, writes_to(tensor), _address(tensor))


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return 0


def indexed(owner: Any) -> dict[Any, Any]:
    if isinstance(owner, dict):  # what is stored, not what a class of its own makes of it when it is asked
        return owner if type(owner).__getitem__ is dict.__getitem__ else dict(dict.items(owner))
    if isinstance(owner, type):
        return dict(vars(owner))
    if isinstance(owner, types.FunctionType):
        return held_by(owner)
    if isinstance(owner, MutableSet):
        return {id(item): item for item in owner}
    return dict(enumerate(owner))


def _untouched(now: Any, then: Any) -> bool:
    """Whether two containers have the same objects in the same order.

    So it is of thousands of containers at each call of a deep model, and found in a fifth of the time of a comparison
    key by key.
    """
    if type(now) is not type(then) or len(now) != len(then):
        return False
    if type(now) is dict:
        return all(map(is_, now.values(), then.values())) and all(map(is_, now, then))
    return type(now) in (list, deque) and all(map(is_, now, then))


def _is(now: Any, then: Any) -> bool:
    return now is then or (type(now) is type(then) and isinstance(now, PLAIN) and now == then)


def _same(now: torch.Tensor, then: torch.Tensor) -> bool:
    if now.shape != then.shape or now.dtype != then.dtype:
        return False
    # Bit for bit, so that a NaN equals itself.
    return torch.equal(*(_bits(tensor) for tensor in (now, then)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
