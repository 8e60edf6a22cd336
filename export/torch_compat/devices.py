"""`on_the_cpu`: a script that names a GPU, on a machine without one.

    model, x = Block().to("cuda"), torch.randn(2, 8, device="cuda")

A patch of what asks a GPU to finish (`torch.cuda.synchronize`), beside PyTorch's public mode that sees each of its
functions. Why: a script that measures its model waits for it, and PyTorch refuses to wait for nothing.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _OnTheCPU(TorchFunctionMode):
    """Tensors that are to be on a GPU are on the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        given = {
            name: _elsewhere(value) if name == "device" else value for name, value in (kwargs or {}).items()
        }
        if func is torch.Tensor.to:
            args = [_elsewhere(value) for value in args]
        return func(*args, **given)


def _elsewhere(value: Any) -> Any:
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """While it runs, `cuda` means the CPU, if there is no GPU."""
    if torch.cuda.is_available():
        yield
        return
    with _OnTheCPU(), mock.patch.object(torch.cuda, "synchronize", return_value=None):
        yield
