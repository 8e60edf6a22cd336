"""Objects of a user's own classes, taken apart into named tensors and made again of others.

    Cache(layers=[Layer(k, v), ...], seen=7)   ⇄   layers.0.k, layers.0.v, ...

A call may write into the object that it is given, so each call is given one of its own. Nothing of the class is called
to make one: whatever is no tensor stays as it was, numbers aside, which may be replaced by others.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_export.export.frontend.pytree import Inside, path_word
from moe_export.export.torch_compat.nesting import pytree

_Put = Callable[[str, Any], Any]
_NEVER = (
    nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType,
    torch.Generator, torch.SymInt, torch.SymFloat, torch.SymBool,
)  # fmt: skip
"""Never looked into: weights of modules are constants wherever they stand, and sizes of a trace lead to tensors."""


def rebuilt(value: Any, put: _Put) -> Any:
    """A copy of a structure with other tensors and numbers.

    Args:
        value: Any nesting of objects, dataclasses, lists, tuples and dicts.
        put: From the path of a tensor or an int, and what is there, what shall be there.
    """
    return _rebuilt(value, "", put, {})


def _rebuilt(value: Any, path: str, put: _Put, made: dict[int, Any]) -> Any:
    if isinstance(value, Tensor) or type(value) is int:
        return put(path, value)
    if id(value) in made:  # one object in two places is one object afterwards
        return made[id(value)]
    if not _holds_tensors(value, set()):
        return copy.copy(value) if type(value) in (list, dict) else value  # a call may add to it
    if isinstance(value, tuple):
        items = [_rebuilt(each, place, put, made) for place, each in _held(value, path)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    new = made[id(value)] = copy.copy(value)
    if isinstance(value, list):
        new[:] = [_rebuilt(each, place, put, made) for place, each in _held(value, path)]
    elif isinstance(value, dict):
        for key, (place, each) in zip(value, _held(value, path), strict=True):
            new[key] = _rebuilt(each, place, put, made)
    else:
        for name, each in _attributes(value).items():
            object.__setattr__(new, name, _rebuilt(each, _joined(path, name), put, made))
    return new


def _held(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What a container holds, by path."""
    if isinstance(value, Mapping):
        named: Any = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        named = zip(value._fields, value, strict=True)
    else:
        named = enumerate(value)
    for key, each in named:
        yield _joined(path, str(key)), each


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds in attributes; nothing if it is of a kind that holds none."""
    if isinstance(value, _NEVER):
        return {}
    slots = [
        name
        for kind in type(value).__mro__
        for name in ([kind.__dict__["__slots__"]] if isinstance(kind.__dict__.get("__slots__"), str)
                     else kind.__dict__.get("__slots__", ()))
        if not name.startswith("__")
    ]  # fmt: skip
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return held | getattr(value, "__dict__", {})


def _joined(path: str, key: str) -> str:
    word = path_word(key)
    return f"{path}.{word}" if path else word


def _holds_tensors(value: Any, seen: set[int]) -> bool:
    if isinstance(value, Tensor):
        return True
    if id(value) in seen or isinstance(value, (str, bytes, int, float, *_NEVER)):
        return False
    seen.add(id(value))
    held = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(_holds_tensors(each, seen) for each in (*held, *_attributes(value).values()))


def tensors_in(value: Any) -> dict[str, Tensor]:
    """The tensors of a structure by their paths, in order."""
    return {path: each for path, each in _leaves_in(value).items() if isinstance(each, Tensor)}


def numbers_in(value: Any) -> dict[str, int]:
    """The ints beside the tensors of a structure by their paths, in order."""
    return {path: each for path, each in _leaves_in(value).items() if isinstance(each, int)}


def _leaves_in(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def put(path: str, each: Any) -> Any:
        found[path] = each
        return each

    rebuilt(value, put)
    return found


@dataclass(frozen=True)
class _Opened:
    """An object among the arguments of a model, as a node of a tree whose leaves are its tensors."""

    value: Any
    names: tuple[str, ...]
    tensors: tuple[Any, ...]

    def closed(self) -> Any:
        """An object of its own, with these tensors."""
        tensors = dict(zip(self.names, self.tensors, strict=True))
        return rebuilt(self.value, tensors.get)


def _is_own(value: Any) -> bool:
    """Whether a value is an object with tensors that PyTorch's tree does not look into."""
    if isinstance(value, (Tensor, *_NEVER)) or type(value) in pytree.SUPPORTED_NODES:
        return False
    return bool(_attributes(value)) and _holds_tensors(value, set())


def open_objects(arguments: Any) -> Any:
    """The same arguments, with nodes for objects that hold tensors."""
    return pytree.tree_map(lambda leaf: _opened(leaf) if _is_own(leaf) else leaf, arguments)


def _opened(value: Any) -> _Opened:
    tensors = tensors_in(value)
    return _Opened(value, tuple(tensors), tuple(tensors.values()))


def close_objects(arguments: Any) -> Any:
    """The arguments that a model takes: nodes as objects, which it may write into, as into those without tensors."""
    return pytree.tree_map(_closed, arguments, is_leaf=lambda value: isinstance(value, _Opened))


def _closed(leaf: Any) -> Any:
    if isinstance(leaf, _Opened):
        return leaf.closed()
    if isinstance(leaf, (Tensor, *_NEVER)) or not hasattr(leaf, "__dict__"):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # it holds a file, a lock, ...
        return leaf


def inside_objects(arguments: Any) -> Inside | None:
    """How to look into what a model returns: into objects of the classes that it takes."""
    nodes = pytree.tree_leaves(arguments, is_leaf=lambda value: isinstance(value, _Opened))
    kinds = tuple({type(node.value) for node in nodes if isinstance(node, _Opened)})
    return (lambda value: tensors_in(value) if isinstance(value, kinds) else None) if kinds else None


def _flatten(opened: _Opened) -> tuple[list[Any], Any]:
    return list(opened.tensors), (opened.value, opened.names)


def _flatten_with_keys(opened: _Opened) -> tuple[list[Any], Any]:
    tensors, context = _flatten(opened)
    names: list[Any] = [pytree.MappingKey(name) for name in opened.names]
    return list(zip(names, tensors, strict=True)), context


def _unflatten(tensors: Any, context: Any) -> _Opened:
    value, names = context
    return _Opened(value, names, tuple(tensors))


pytree.register_pytree_node(_Opened, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys)
