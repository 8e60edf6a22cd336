"""`without_files`: what a script does with the files of an export that has written none.

    torch.onnx.export(encoder, (x,), "encoder.onnx")      answered, and not run
    onnx.checker.check_model(onnx.load("encoder.onnx"))   has nothing to check, and must not end the script here:
    torch.onnx.export(decoder, (h,), "decoder.onnx")      is what is asked for

A patch of the readers and checkers of ONNX files, and of what starts other programs: given such a file, or what came of
one, each gives a stand-in back. Why: none of them can be observed.

Seen in torch 2.13.0 with onnx 1.23.2, onnxruntime 1.31.1 and onnxsim 0.8.1.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

READERS: tuple[tuple[str, str], ...] = (
    ("onnx", "load"),
    ("onnx", "load_model"),
    ("onnx", "save"),
    ("onnx", "save_model"),
    ("onnx.checker", "check_model"),
    ("onnx.shape_inference", "infer_shapes"),
    ("onnxruntime", "InferenceSession"),
    ("onnxsim", "simplify"),
    ("subprocess", "run"),
    ("subprocess", "call"),
    ("subprocess", "check_call"),
    ("subprocess", "check_output"),
    ("os", "system"),
)


@contextmanager
def without_files(names: Collection[str], kind: type, stand_in: Any) -> Iterator[None]:
    """While it runs, what is given one of these files is not run.

    Args:
        names: The files; looked at anew at each call.
        kind: The class of stand-ins.
        stand_in: What is returned.
    """

    def reader(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            return stand_in if any(_means(each, names, kind) for each in given) else original(*args, **kwargs)

        return read

    with ExitStack() as stack:
        for module, attribute in READERS:
            try:
                owner = importlib.import_module(module)
            except ImportError:
                continue
            if hasattr(owner, attribute):
                door = reader(getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, door))
        yield


def _means(value: Any, names: Collection[str], kind: type) -> bool:
    if isinstance(value, kind):
        return True
    if isinstance(value, (list, tuple)):
        return any(_means(each, names, kind) for each in value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return isinstance(value, str) and any(name in value for name in names)
