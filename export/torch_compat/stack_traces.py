"""`kept_frames`: which frames a tracer writes into `node.meta["stack_trace"]`.

Why: it keeps those of functions called `forward`, so a function that a `forward` calls has no line. The method says
that it "can be overridden to customize" this; but `torch.export` makes its tracer itself, and takes no other.

Seen in torch 2.13.0 and 2.14.1 (`torch.fx.proxy.TracerBase._filter_traceback_frames`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

    with mock.patch.object(fx.proxy.TracerBase, "_filter_traceback_frames", filtered):
        yield
