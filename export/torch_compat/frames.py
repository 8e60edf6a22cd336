"""`asking_frame`: the frame of a model's code that asks for the truth of a value, right now.

Why: whether a statement may be traced one way only is written in the statement, and a question about a tensor comes
without one: `if mask.any():` is `Tensor.__bool__`, called by whoever asks. PyTorch asks its own questions, too; those
come from files of it that have nothing to do with handing a question on.

Seen in torch 2.13.0 and 2.14.1: a question is handed on by `torch/__init__.py` (`SymBool`), `torch/fx/experimental/`
and the functions called `__torch_function__`, `handle_torch_function` and `__contains__` (`e in indices`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_ASKING = (os.path.join(_TORCH, "__init__.py"), os.path.join(_TORCH, "fx", "experimental") + os.sep)
_HANDING_ON = {"__torch_function__", "handle_torch_function", "__contains__"}


def asking_frame(is_models: Callable[[str], bool]) -> FrameType | None:
    """The innermost frame of a model's code; None where PyTorch asks for itself.

    Args:
        is_models: Whether a file, by its path, may be a model's.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        inside = path.startswith(_TORCH)
        if inside and not path.startswith(_ASKING) and frame.f_code.co_name not in _HANDING_ON:
            return None
        if not inside and os.path.isabs(path) and is_models(path):
            return frame
        frame = frame.f_back
    return None
