"""`canary`: what a test of something that PyTorch does not promise says when PyTorch is another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnxscript
import pytest
import torch


@contextmanager
def canary(file: str, relied_on: str, *, todo: str) -> Iterator[None]:
    """Whatever goes wrong inside fails the test with a sentence that says what to do.

    Args:
        file: Of the door, where the private name stands.
        relied_on: What was so in the versions that the file names.
        todo: What to do about it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own, of its own code
            yield
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        pytest.fail(
            f"torch {torch.__version__} with onnxscript {onnxscript.__version__} no longer does what {file} relies on: "
            f"{relied_on} ({why}). To do: {todo}",
            pytrace=False,
        )
