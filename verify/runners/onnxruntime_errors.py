"""What an error of ONNX Runtime says: its classes stand in a module without documentation, and the rest is in the text.

Seen in onnxruntime 1.31.1. A canary tells when another version says it in another way:
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
    """Whether a file is no ONNX model, or ends early."""
    return type(error).__name__ == "InvalidProtobuf" or "No graph was found" in str(error)


def has_no_kernel(error: Exception) -> bool:
    """Whether it cannot run an operator in a type, which another engine may be able to."""
    return type(error).__name__ == "NotImplemented"
