"""`symbolic_length`: `len(tensor)` as a size that may stay a symbol.

Why: Python makes a plain integer of whatever `__len__` gives, so a trace that met `len(x)` would hold for one size. The
name `len` is Python's own, and a function mode is asked too late. So while a model is traced, it stands for another
function, which is Python's for all that is no tensor.

Seen in torch 2.13.0 and 2.14.1 (`Tensor.__len__`).
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

_len = len


class TracedList:
    """What code takes for a list while it is traced.

    Attributes:
        shape: How many elements it has, which may be a symbol.
    """

    shape: tuple[Any, ...]


def _length(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, TracedList)) and value.shape:
        return value.shape[0]
    return _len(value)


@contextmanager
def symbolic_length() -> Iterator[None]:
    """While it runs, `len` of a tensor, or of a `TracedList`, is `shape[0]`."""
    with mock.patch.object(builtins, "len", _length):
        yield
