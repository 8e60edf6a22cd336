"""How integer inputs are used, observed while a PyTorch model runs: which tables they index, which ones Python reads.

An input is followed through views, casts and sums with a number to where it is an index:

    embedding(table, ids)    table[ids]    x.gather(1, ids)    scatter(x, 1, ids)    one_hot(ids, 8)    table[ids + 2]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_export.verify.torch_compat import OperatorMode, leaves

_SAME = {
    "_to_copy", "_unsafe_view", "alias", "clone", "contiguous", "detach", "expand", "flatten", "lift_fresh", "permute",
    "repeat", "reshape", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip
_ALONG = {
    "gather",
    "index_select",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_add",
    "index_copy",
    "index_fill",
}
_READ = {"_local_scalar_dense", "repeat_interleave", "bincount", "nonzero", "_assert_async"}


@dataclass(frozen=True)
class _Origin:
    """The input that a tensor comes from, and the number added to it; None if it is no longer that input."""

    name: str
    added: int | None = 0


class IndexWatcher(OperatorMode):
    """Follows integer inputs.

    Args:
        tensors: The integer inputs, by name.

    Attributes:
        tables: Input → the least and the greatest value that every table it indexes has a row for.
        read: Inputs on which Python code or the shape of a result depends.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.tables: dict[str, tuple[int, int]] = {}
        self.read: set[str] = set()
        self._known = {id(tensor): (tensor, _Origin(name)) for name, tensor in tensors.items()}

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        name = func.__name__.partition(".")[0].rstrip("_")
        origins = [found for leaf in leaves((args, kwargs)) if (found := self._origin(leaf))]
        if origins:
            self._note(name, args, origins)
            for leaf in leaves(result):
                if isinstance(leaf, torch.Tensor) and not leaf.is_floating_point():
                    self._known[id(leaf)] = (leaf, _through(name, args, kwargs, origins[0]))
        return result

    def _origin(self, leaf: Any) -> _Origin | None:
        known = self._known.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None
        return None if known is None else known[1]

    def _note(self, name: str, args: tuple[Any, ...], origins: list[_Origin]) -> None:
        if name.lstrip("_") in {read.lstrip("_") for read in _READ}:
            self.read.update(origin.name for origin in origins)
        for index, rows in _indices(name, args):
            origin = self._origin(index)
            if origin is not None and origin.added is not None:
                low, high = self.tables.get(origin.name, (-origin.added, rows - 1 - origin.added))
                self.tables[origin.name] = (max(low, -origin.added), min(high, rows - 1 - origin.added))


def _indices(name: str, args: tuple[Any, ...]) -> Iterator[tuple[Any, int]]:
    """The indices of an operator, each with how many rows there are to pick from."""
    if name == "embedding":
        yield args[1], args[0].shape[0]
    elif name in {"index", "index_put", "_unsafe_index", "_index_put_impl"}:
        yield from ((index, args[0].shape[axis]) for axis, index in enumerate(args[1]) if index is not None)
    elif name in _ALONG and args[0].dim():
        yield args[2], args[0].shape[args[1]]
    elif name == "take":
        yield args[1], args[0].numel()
    elif name == "one_hot" and len(args) > 1 and args[1] > 0:
        yield args[0], args[1]


def _through(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], origin: _Origin) -> _Origin:
    """The origin of an operator's result."""
    if name in _SAME:
        return origin
    if name in {"add", "sub"} and len(args) > 1 and origin.added is not None and kwargs.get("alpha", 1) == 1:
        number = _number(args[1])
        if number is not None:
            return replace(origin, added=origin.added + (number if name == "add" else -number))
    return replace(origin, added=None)


def _number(value: Any) -> int | None:
    return value if type(value) is int else None


def integers_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that may be ids."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
    }


def watch_indices(
    call: Callable[[dict[str, torch.Tensor]], Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, tuple[int, int]], frozenset[str]]:
    """The tables that integer inputs index, and the inputs that are read by Python.

    Of a model that cannot be watched (`torch.while_loop` refuses to be), single integers count as read: one may be the
    number of iterations, and a large one would never end.
    """
    integers = integers_of(tensors)
    if not integers:
        return {}, frozenset()
    watcher = IndexWatcher(integers)
    with torch.no_grad(), watcher:
        try:
            call(tensors)
        except Exception:  # whatever a model raises; it is recorded where the case is compared
            return {}, frozenset(name for name, tensor in integers.items() if tensor.numel() == 1)
    return watcher.tables, frozenset(watcher.read)
