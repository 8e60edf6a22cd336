"""Which frames a tracer writes into `node.meta["stack_trace"]`, and how fast it reads them.

- `kept_frames`. Why: the tracer keeps the frames of functions called `forward`, so a function that a `forward` calls
  has no line. The method says that it "can be overridden to customize" this; but `torch.export` makes its tracer
  itself, and takes no other.
- `frames_read_once`. Why: each node has a hundred frames, the same for nearly all of them. PyTorch writes the stack
  down outside Python, looks up the line of each frame, and makes an object of each, anew for each node.

Seen in torch 2.13.0 and 2.14.1 (`TracerBase._filter_traceback_frames` and `CapturedTraceback` of `torch.fx.proxy`).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from unittest import mock

from torch import fx

Frames = Iterable[traceback.FrameSummary]


@contextmanager
def kept_frames(keep: Callable[[Frames, traceback.StackSummary], Frames]) -> Iterator[None]:
    """While it runs, tracers keep other frames.

    Args:
        keep: Is given the frames that the tracer keeps by itself and all frames, outermost first; the frames to keep.
    """
    original = fx.proxy.TracerBase._filter_traceback_frames

    def filtered(self: fx.proxy.TracerBase, summary: traceback.StackSummary) -> traceback.StackSummary:
        return traceback.StackSummary.from_list(keep(original(self, summary), summary))

    with mock.patch.object(fx.proxy.TracerBase, "_filter_traceback_frames", filtered), frames_read_once():
        yield


@contextmanager
def frames_read_once() -> Iterator[None]:
    """While it runs, tracers read the stack of a node themselves, and make the frame of a place in the code once.

    Where PyTorch reads frames elsewhere, its own way is taken: that is slower, and as right.
    """
    if not hasattr(fx.proxy, "CapturedTraceback"):
        yield
        return
    with mock.patch.object(fx.proxy, "CapturedTraceback", _Stacks()):
        yield


class _Stacks:
    """What a tracer uses of `CapturedTraceback`: `CapturedTraceback.extract().summary()`."""

    def __init__(self) -> None:
        # By code and place in it. Code is known by its identity, so it must not go: two files may hold equal ones.
        self._known: dict[tuple[int, int], tuple[CodeType, traceback.FrameSummary]] = {}
        self._frames: list[traceback.FrameSummary] = []

    def extract(self) -> _Stacks:
        """Read the stack of the caller."""
        self._frames = []
        frame = sys._getframe().f_back
        while frame is not None:
            key = (id(frame.f_code), frame.f_lasti)
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = (frame.f_code, _summary(frame))
            self._frames.append(known[1])
            frame = frame.f_back
        return self

    def summary(self) -> traceback.StackSummary:
        """Outermost first."""
        stack = traceback.StackSummary()
        stack.extend(reversed(self._frames))
        return stack


def _summary(frame: FrameType) -> traceback.FrameSummary:
    code, line = frame.f_code, frame.f_lineno
    return traceback.FrameSummary(code.co_filename, -1 if line is None else line, code.co_name)
