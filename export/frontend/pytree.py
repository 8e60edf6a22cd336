"""Nested arguments and outputs as a flat list of named tensors, and back.

Whatever a model takes or returns (tuples, dicts, named tuples, dataclasses, transformers' outputs and caches),
a graph has a flat list of named tensors. What is no tensor stays behind as a constant, with its name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from moe_export.export.torch_compat.nesting import pytree

Inside = Callable[[Any], Mapping[str, Any] | None]
"""What an object of some class holds, by name; None of any other."""

KEY, VALUE = "key", "value"
"""What the two tensors are called that attention keeps for a layer."""

WINDOW, STATE = "conv_state", "recurrent_state"
"""What a convolution and a recurrence keep for a layer."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One value inside a nested structure: its path joined by `.`, and the value (tensor or constant)."""

    name: str
    value: Any

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, torch.Tensor)


def leaves(value: Any, name: str = "", inside: Inside | None = None) -> Iterator[Leaf]:
    """Walk a nested structure in a fixed order and yield its leaves; `None` is no leaf.

    Args:
        value: A tensor, a constant, or any nesting of tuples, lists, mappings, named tuples, dataclasses and
            registered pytree nodes.
        name: The prefix of every path.
        inside: What other objects hold that are no leaves.
    """
    if value is None:
        return
    for key, child in _children(value, inside):
        if key is None:
            yield Leaf(name, child)
        else:
            yield from leaves(child, f"{name}.{path_word(key)}" if name else path_word(key), inside)


def _children(value: Any, inside: Inside | None) -> Iterator[tuple[str | None, Any]]:
    """The named children of a container, or `(None, value)` for a leaf."""
    if isinstance(value, torch.Tensor):
        yield None, value
    elif inside is not None and (held := inside(value)) is not None:
        yield from held.items()
    elif isinstance(value, Mapping):
        yield from ((str(key), child) for key, child in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif is_cache(value):
        yield from ((str(index), {KEY: key, VALUE: each}) for index, (key, each) in enumerate(value))
    elif isinstance(value, (tuple, list)):
        yield from ((str(index), child) for index, child in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif type(value) in pytree.SUPPORTED_NODES:
        yield from children(value)
    else:
        yield None, value


def children(value: Any) -> list[tuple[str, Any]]:
    """What a node of torch's registry holds, in torch's order: by the keys that it is registered with, else by the
    attributes that are its children, else by number. A value of any other class holds nothing.
    """

    def is_leaf(each: Any) -> bool:
        return each is not value

    found, spec = pytree.tree_flatten(value, is_leaf=is_leaf)
    if spec.is_leaf():
        return []
    if pytree.SUPPORTED_NODES[spec.type].flatten_with_keys_fn is not None:
        pairs = pytree.tree_flatten_with_path(value, is_leaf=is_leaf)[0]
        return [(pytree.keystr(path), child) for path, child in pairs]
    names = {id(child): name for name, child in getattr(value, "__dict__", {}).items()}
    return [(names.get(id(child), str(index)), child) for index, child in enumerate(found)]


def is_cache(value: Any) -> bool:
    """Whether a value is what attention keeps: a list of (keys, values), one pair for each layer.

    Keys and values have four axes each, whose order may differ, and their widths, too: (batch, heads, length, width).
    """
    return isinstance(value, (tuple, list)) and bool(value) and all(map(_is_pair, value))


def _is_pair(item: Any) -> bool:
    if type(item) not in (tuple, list) or len(item) != 2:
        return False
    if not all(isinstance(part, torch.Tensor) and part.dim() == 4 for part in item):
        return False
    keys, values = item
    same = keys.shape[:-1] == values.shape[:-1] or sorted(keys.shape) == sorted(values.shape)
    return same and keys.dtype == values.dtype and keys.is_floating_point()


def identifier(text: str) -> str:
    """Make a legal, readable value name of any key: `"a.b[0]"` → `a_b_0`."""
    return re.sub(r"\W+", "_", text).strip("_") or "value"


def path_word(text: str) -> str:
    """A key as a part of a path, which may be a path itself: `"['b.c']"` → `b.c`."""
    return re.sub(r"[^\w.]+", "_", text).strip("._") or "value"


def unique(names: list[str], taken: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """The same names, with `_1`, `_2` behind those that are already taken."""
    used = set(taken)
    result = []
    for name in names:
        candidate, count = name, 0
        while candidate in used:
            count += 1
            candidate = f"{name}_{count}"
        used.add(candidate)
        result.append(candidate)
    return result
