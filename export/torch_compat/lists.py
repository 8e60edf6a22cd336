"""`lists_answered`: what `tolist` gives for a traced tensor.

Why: tensors of a trace have a `tolist` of their own, written in Python, which reads one element after another. A
function mode sees the reading, but not what it is for, and cannot read a number of elements that only the data knows.

Seen in torch 2.13.0 and 2.14.1 (`FakeTensor.tolist`, `FunctionalTensor.tolist`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor


@contextmanager
def lists_answered(answer: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """While it runs, `tolist` of a traced tensor gives the answer, if there is one that is not None."""

    def answered(original: Callable[[Any], Any]) -> Callable[[torch.Tensor], Any]:
        def tolist(tensor: torch.Tensor) -> Any:
            found = answer(tensor)
            return original(tensor) if found is None else found

        return tolist

    with ExitStack() as stack:
        for kind in (FakeTensor, FunctionalTensor):
            stack.enter_context(mock.patch.object(kind, "tolist", answered(kind.tolist)))
        yield
