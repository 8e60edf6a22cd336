"""Errors of ONNX Runtime, read from their text: its exception classes are undocumented and say little.

Seen in onnxruntime 1.31.1. A canary fails when another version words them differently:
`tests/verify/test_onnxruntime_errors.py`.
"""

from __future__ import annotations

import re

from moe_export.verify.runner import shorten

_FROM_SOURCES = re.compile(r"/\S*/onnxruntime/\S+:\d+ (?:[^()]*\([^()]*\) (?:const )?)?")
"""The line of a source, and the function that stands there: `/…/bfc_arena.cc:360 void* BFCArena::Allocate(size_t) `."""
_OF_A_NODE = re.compile(
    r"Non-zero status code returned while running (\S+) node\. Name:'(.*?)' Status Message: (.*)"
)


def reason_of(error: Exception) -> str:
    """The message without its preamble, `[ONNXRuntimeError] : 1 : FAIL : `, and without places in its sources; of
    a node that failed first why, then its name, which may be long.
    """
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    text = _FROM_SOURCES.sub("", text)
    failed = _OF_A_NODE.match(text)
    return shorten("{2}, in {0} '{1}'".format(*failed.groups()) if failed else text, 400)


def has_no_memory(error: Exception) -> bool:
    """Whether an operator's result did not fit in memory."""
    return any(words in str(error) for words in ("Failed to allocate memory", "std::bad_alloc"))


def is_no_model(error: Exception) -> bool:
    """Whether the file is truncated or not an ONNX model."""
    return type(error).__name__ == "InvalidProtobuf" or "No graph was found" in str(error)


def has_no_kernel(error: Exception) -> bool:
    """Whether an operator has no kernel for a type, which another engine may have."""
    return type(error).__name__ == "NotImplemented"
