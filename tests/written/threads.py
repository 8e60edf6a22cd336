"""ONNX Runtime with a number of threads that whoever opens its sessions did not choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import onnxruntime


@contextmanager
def onnxruntime_threads(count: int) -> Iterator[None]:
    """Sessions that are opened meanwhile compute an operator with so many threads."""

    class Options(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = count

    with mock.patch.object(onnxruntime, "SessionOptions", Options):
        yield
