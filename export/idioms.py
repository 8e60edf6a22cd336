"""Calls whose trace would bake in a size, traced as an equal form that does not. One rule an idiom.

The user's file is not touched: the calls are seen while the model is traced, whoever makes them.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from moe_export.export.source import is_user_file


class _Idioms(TorchFunctionMode):
    """`one_hot(x, n)` with a symbolic n → `x[..., None] == arange(n)`.

    torch.export notes n as a guard, which the ONNX exporter drops: the file would silently be wrong at any other
    size. Capacities of GShard and DeepSpeed are such an n.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.one_hot:
            classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
            if isinstance(classes, torch.SymInt):
                tensor = args[0] if args else kwargs["tensor"]
                marks = torch.arange(classes, device=tensor.device)  # type: ignore[call-overload]
                return (tensor.unsqueeze(-1) == marks).to(torch.int64)
        return func(*args, **kwargs)


@contextmanager
def traceable_idioms() -> Iterator[None]:
    """While it runs, every idiom above is traced in its other form."""
    with _Idioms():
        yield


@contextmanager
def user_lines() -> Iterator[None]:
    """Let the tracer keep the user's own lines in stack traces; by itself it keeps those of `forward` only."""
    original = fx.proxy.TracerBase._filter_traceback_frames

    def keep(self: fx.proxy.TracerBase, summary: traceback.StackSummary) -> traceback.StackSummary:
        forwards = {(frame.filename, frame.lineno) for frame in original(self, summary)}
        return traceback.StackSummary.from_list(
            frame
            for frame in summary
            if (frame.filename, frame.lineno) in forwards or is_user_file(frame.filename)
        )

    with mock.patch.object(fx.proxy.TracerBase, "_filter_traceback_frames", keep):
        yield
