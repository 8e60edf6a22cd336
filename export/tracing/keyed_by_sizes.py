"""Dicts that a model keeps from call to call (masks by length), traced with keys that are sizes of the trace.

    if n not in self.masks:                     n is a symbol of the trace, and no number:
        self.masks[n] = ones(n, n).tril()       a dict could not look it up, and n would be fixed
    return x @ self.masks[n]

Each model starts with what it holds when it is loaded, so a table made by a call is not there yet and is computed, as
in a fresh model. What is there, under a number from before or under another size of the same call, is compared with the
size: the answer becomes a condition of the trace, as that of `if n == 8` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from moe_export.export.frontend.state import State
from moe_export.export.sizes import same_size

_MOST = 64
"""Entries that a size is compared with: each may become a condition, and a table of thousands is no cache."""
_MISSING = object()


class _Symbolic:
    """A key with a size of the trace in it, which has no hash of its own."""

    def __init__(self, key: Any) -> None:
        self.key = key


class KeyedBySizes(dict[Any, Any]):
    """A dict that finds sizes of a trace, and tuples with such sizes in them."""

    def __init__(self, items: Mapping[Any, Any]) -> None:
        super().__init__(dict.items(items) if isinstance(items, dict) else items)

    def _stored(self, key: Any) -> Any:
        """The key under which it is stored."""
        symbolic = _has_symbol(key)
        if not symbolic and dict.__contains__(self, key):
            return key
        others = [each for each in dict.keys(self) if symbolic or isinstance(each, _Symbolic)]
        if len(others) > _MOST:
            raise TypeError("a size is looked up in a large table")
        return next(
            (each for each in others if _same(key, each.key if isinstance(each, _Symbolic) else each)),
            _MISSING,
        )

    def __contains__(self, key: object) -> bool:
        return self._stored(key) is not _MISSING

    def __getitem__(self, key: Any) -> Any:
        stored = self._stored(key)
        if stored is _MISSING:
            raise KeyError(key)
        return dict.__getitem__(self, stored)

    def __setitem__(self, key: Any, value: Any) -> None:
        stored = self._stored(key)
        if stored is _MISSING:
            stored = _Symbolic(key) if _has_symbol(key) else key
        dict.__setitem__(self, stored, value)

    def __delitem__(self, key: Any) -> None:
        stored = self._stored(key)
        if stored is _MISSING:
            raise KeyError(key)
        dict.__delitem__(self, stored)

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dict."""
        stored = self._stored(key)
        return default if stored is _MISSING else dict.__getitem__(self, stored)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """As of a dict."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        """As of a dict."""
        stored = self._stored(key)
        return dict.pop(self, key if stored is _MISSING else stored, *default)


def keyed_by_sizes(state: State) -> None:
    """Let such dicts stand in the place of those that a model keeps; whoever puts its state back puts them back.

    Args:
        state: Of the model.
    """
    state.replace_dicts(KeyedBySizes)


def _parts(key: Any) -> Iterator[Any]:
    if isinstance(key, tuple):
        for part in key:
            yield from _parts(part)
    else:
        yield key


def _has_symbol(key: Any) -> bool:
    return any(isinstance(part, torch.SymInt) for part in _parts(key))


def _same(one: Any, other: Any) -> bool:
    """Whether two keys are the same; where a size is compared with a number, for the sizes that the trace is for."""
    if isinstance(one, tuple) or isinstance(other, tuple):
        if not (isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other)):
            return False
        pairs = sorted(zip(one, other, strict=True), key=lambda pair: any(_has_symbol(each) for each in pair))
        return all(_same(*pair) for pair in pairs)
    if same_size(one, other):
        return True
    if isinstance(one, torch.SymInt) or isinstance(other, torch.SymInt):
        numbers = all(
            isinstance(each, (int, torch.SymInt)) and not isinstance(each, bool) for each in (one, other)
        )
        return numbers and bool(one == other)
    return one is other or (hash(one) == hash(other) and bool(one == other))
