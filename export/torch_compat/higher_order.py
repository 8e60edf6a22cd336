"""`closures_lifted`: the functions that `torch.while_loop` and its like are given may close over weights and inputs.

Why: such an operator compiles its functions, and what they close over becomes arguments of the compiled ones. Where
compilation is switched off (a model's own `torch.compile` is not to run), tensors of the trace end up as constants in
the graph of the loop, and nothing can copy it. And what is carried must not be closed over besides: PyTorch asks for
copies there, in words that name no line.

Seen in torch 2.13.0: `torch._higher_order_ops.utils._hop_compile_and_call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._higher_order_ops import utils as higher_order


@contextmanager
def closures_lifted() -> Iterator[None]:
    """While it runs, operators that take functions compile these; what a `while_loop` carries is a copy."""
    original: Callable[..., Any] = higher_order._hop_compile_and_call

    def compiled(function: Any, args: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
        if "while_loop" in function.__name__:
            condition, body, carried, *more = args
            args = (condition, body, tuple(map(_copied, carried)), *more)
        with torch.compiler.set_stance("default"):
            return original(function, args, kwargs)

    with mock.patch.object(higher_order, "_hop_compile_and_call", compiled):
        yield


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
