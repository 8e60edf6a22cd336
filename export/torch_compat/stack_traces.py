"""Which frames a tracer writes into `node.meta["stack_trace"]`, and how fast it reads them.

- `kept_frames`. Why: the tracer keeps the frames of functions called `forward`, so a function that a `forward` calls
  has no line. The method says that it "can be overridden to customize" this; but `torch.export` makes its tracer
  itself, and takes no other.
- `frames_read_once`. Why: each node has a hundred frames, the same for nearly all of them, and the line of each frame
  was looked up anew for each node: a tenth of the time of a trace.

Seen in torch 2.13.0 and 2.14.1 (`torch.fx.proxy.TracerBase._filter_traceback_frames`, `torch.utils._traceback`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
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
    """While it runs, the frame of a line is made once, with the source of the line in it.

    Where PyTorch reads frames elsewhere, its own way is taken: that is slower, and as right.
    """
    from torch.utils import _traceback

    @cache
    def frame(filename: str, line: int, name: str) -> traceback.FrameSummary:
        return traceback.FrameSummary(filename, line, name)

    def extracted(frames: Sequence[Mapping[str, Any]], skip: int) -> traceback.StackSummary:
        """Outermost first."""
        stack = traceback.StackSummary()
        stack.extend(frame(each["filename"], each["line"], each["name"]) for each in reversed(frames[skip:]))
        return stack

    if not hasattr(_traceback, "_extract_symbolized_tb"):
        yield
        return
    with mock.patch.object(_traceback, "_extract_symbolized_tb", extracted):
        yield
