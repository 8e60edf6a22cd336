"""`constants_of`: the integers that a model's code has in it, near which it may do something else.

    if t >= 60: break        range(min(length, 48))        x[:, -16:]        i % 7        self.chunk_size        LIMIT

A trace goes one way through the code, and an example shows one size; what happens at other sizes is written in
comparisons, slices and moduli. So the code that runs is watched once: the constants of its functions, the globals that
they read, what they compute of these (`computed`), the integers that they are called with, and those that the modules
hold.
"""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from moe_export.export.frontend.source import is_library_model, is_user_file
from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.computed import computed_in

_LEAST, _MOST = 2, 2**16  # 0 and 1 are tried anyway; what is larger is no length that is compared at
_CALLS = 32  # of a function that a loop calls, the first ones show what it is called with
_MANY = 64  # of a large configuration nearly every integer is a width; those in the code that ran come first


def constants_of(subject: Subject, *, widths: bool = True) -> tuple[int, ...]:
    """The integers in the code that a model runs, each once: its own constants first, then what its modules hold.

    Args:
        subject: The model; it is run once, on its example.
        widths: Whether to count what modules hold, or are called with, and is a width of a weight besides.
    """
    seen = _Seen()
    before = sys.gettrace()  # a debugger's, a coverage tool's
    with torch.no_grad(), suppress(Exception):  # a model that fails here is refused where it is traced
        sys.settrace(seen.note)  # called for each Python function, and no line or built-in of it
        try:
            subject.call([tensor.clone() for tensor in subject.inputs.values()])
        finally:
            sys.settrace(before)
    around = [*seen.computed, *_held(subject.module), *seen.passed]
    if not widths:
        taken = {size for weight in subject.module.parameters() for size in weight.shape}
        around = [number for number in around if number not in taken]
    found = [*seen.written, *around]
    return tuple(dict.fromkeys(number for number in found if _LEAST <= number <= _MOST))[:_MANY]


class _Seen:
    """Notes integers as functions of the model are called."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.computed: dict[int, None] = {}
        self.passed: dict[int, None] = {}
        self._calls: Counter[CodeType] = Counter()

    def note(self, frame: FrameType, event: str, argument: Any) -> None:
        """What `sys.settrace` calls."""
        code = frame.f_code
        if not _is_model_code(code.co_filename):
            return
        self._calls[code] += 1
        if self._calls[code] == 1:
            self.written += _integers(code.co_consts)
            self.written += _integers(frame.f_globals.get(name) for name in code.co_names)
        if self._calls[code] <= _CALLS:
            self.passed.update(dict.fromkeys(_integers(frame.f_locals.values())))
            self.computed.update(dict.fromkeys(map(abs, computed_in(code, frame.f_locals, frame.f_globals))))


@cache
def _is_model_code(path: str) -> bool:
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    packages = ("site-packages", "dist-packages")
    inside = Path(path).resolve().parents
    is_standard = standard in inside and not any(folder.name in packages for folder in inside)
    return is_user_file(path) or (is_library_model(path) and not is_standard)


def _held(module: nn.Module) -> Iterator[int]:
    """Integers that modules have as attributes, and the lengths of their buffers: tables of positions, masks."""
    for each in module.modules():
        own: Mapping[str, Any] = vars(each)
        yield from _integers(value for name, value in own.items() if not name.startswith("_"))
        yield from (
            buffer.shape[axis] for buffer in each.buffers(recurse=False) for axis in range(buffer.dim())
        )


def _integers(values: Iterable[Any], depth: int = 2) -> list[int]:
    """The integers among values, and in lists and tables of them."""
    found: list[int] = []
    for value in values:
        if type(value) is int:
            found.append(abs(value))  # x[-16:]
        elif isinstance(value, (list, tuple, set, frozenset, dict)) and depth and len(value) <= _MANY:
            found += _integers(value.values() if isinstance(value, dict) else value, depth - 1)
    return found
