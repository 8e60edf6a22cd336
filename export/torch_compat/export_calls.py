"""`export_calls`: what a script hands to an exporter of PyTorch is seen at the exporter's door.

A patch of `torch.onnx.export`, `torch.export.export`, `torch.export.draft_export`, `torch.jit.trace` and
`torch.jit.script`. Why: none of them can be observed, and each fails on models that go into a graph here.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.export
import torch.jit
import torch.onnx

EXPORTERS: dict[str, tuple[Any, str]] = {
    "torch.onnx.export": (torch.onnx, "export"),
    "torch.export.export": (torch.export, "export"),
    "torch.export.draft_export": (torch.export, "draft_export"),
    "torch.jit.trace": (torch.jit, "trace"),
}
"""Each takes a model and its arguments: where it stands, and its name there."""


@contextmanager
def export_calls(seen: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """While it runs, a call of an exporter first tells `seen` its name and its arguments by their names.

    `torch.jit.script` is given no arguments of the model, and so gives a model back as it is.
    """
    compile_script = torch.jit.script

    def script(obj: Any, *args: Any, **kwargs: Any) -> Any:
        return obj if isinstance(obj, torch.nn.Module) else compile_script(obj, *args, **kwargs)

    with ExitStack() as stack:
        for name, (owner, attribute) in EXPORTERS.items():
            stack.enter_context(
                mock.patch.object(owner, attribute, _telling(name, getattr(owner, attribute), seen))
            )
        stack.enter_context(mock.patch.object(torch.jit, "script", script))
        yield


def _telling(
    name: str, original: Callable[..., Any], seen: Callable[[str, dict[str, Any]], None]
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def export(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:  # the exporter's own error says more
            return original(*args, **kwargs)
        given.apply_defaults()
        seen(name, dict(given.arguments))
        return original(*args, **kwargs)

    return export
