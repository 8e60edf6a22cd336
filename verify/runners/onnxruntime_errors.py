"""Errors of ONNX Runtime, read from their text: its exception classes are undocumented and say little.

Seen in onnxruntime 1.31.1. A canary fails when another version words them differently:
`tests/verify/test_onnxruntime_errors.py`.
"""

from __future__ import annotations

import re

from moe_export.verify.runner import shorten


def reason_of(error: Exception) -> str:
    """The message without its preamble, `[ONNXRuntimeError] : 1 : FAIL : `, and without paths of its sources."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return shorten(re.sub(r"/\S*/onnxruntime/\S+:\d+ ", "", text), 400)


def is_no_model(error: Exception) -> bool:
    """Whether the file is truncated or not an ONNX model."""
    return type(error).__name__ == "InvalidProtobuf" or "No graph was found" in str(error)


def has_no_kernel(error: Exception) -> bool:
    """Whether an operator has no kernel for a type, which another engine may have."""
    return type(error).__name__ == "NotImplemented"
