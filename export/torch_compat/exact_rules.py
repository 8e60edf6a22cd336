"""Constants in the rules of the exporter's optimizer match themselves, not what is close to them.

onnxscript takes a number within 1e-8, or within 1e-5 of its size, for the one in a rule: `x + 1e-9` is `x + 0`, so is
`x`, and what the 1e-9 kept from being 0 / 0 is no number. So is DeepSeek's `weights / (weights.sum() + 1e-20)`.

Why: the tolerance stands in `SimplePatternMatcher` of `onnxscript.rewriter`, and neither the rules of `_no_op` nor who
applies them can give another. Where it is built in another way, it is left as it is.

Seen in onnxscript 0.7.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import ml_dtypes
import numpy as np

_TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


@contextmanager
def exact_constants() -> Iterator[None]:
    """While it runs, rules of the optimizer match exact constants only."""
    try:
        from onnxscript.rewriter import _matcher as matcher
    except ImportError:
        yield
        return
    if getattr(matcher, "math", None) is not math:
        yield
        return
    exactly = SimpleNamespace(**{**vars(math), "isclose": _same})
    with mock.patch.object(matcher, "math", exactly):
        yield


def _same(found: float, expected: float, **tolerances: float) -> bool:
    """Whether a constant is the expected number, or what is left of it in a type that a graph has."""
    return found == expected or any(found == float(kind(expected)) for kind in _TYPES)
