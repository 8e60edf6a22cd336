"""`forwards`: what autograd functions of users compute, in another form.

Why: a trace goes through the `forward` of a `torch.autograd.Function`, and PyTorch has no hook there: a function mode
does not see `apply`.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def forwards(instead: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While it runs, autograd functions that are not PyTorch's own compute something else.

    Args:
        instead: Is given a `forward(context, *arguments)`; what is called in its place.
    """
    with ExitStack() as stack:
        for function in _subclasses(torch.autograd.Function):
            original = getattr(function, "forward", None)
            if original is not None and not function.__module__.startswith("torch."):
                stack.enter_context(mock.patch.object(function, "forward", staticmethod(instead(original))))
        yield


def _subclasses(kind: Any) -> Iterator[Any]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)
