"""Which lines are the user's."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

import moe_export.errors
import moe_export.export.frontend.load
from moe_export.export.frontend.source import (
    is_own_file,
    is_user_file,
    last_model_line,
    last_user_line,
    line_of,
)


def test_files():
    assert is_user_file(__file__)
    assert not is_user_file(torch.__file__)
    assert not is_user_file(json.__file__)
    assert not is_user_file("<string>")
    assert not is_user_file("/another/environment/lib/python3.11/site-packages/einx/api.py")
    assert is_own_file(moe_export.export.frontend.load.__file__)
    assert is_own_file(moe_export.errors.__file__)
    assert not is_own_file(__file__)


def _raises():
    return json.loads("{")


def test_the_line_of_an_error():
    with pytest.raises(json.JSONDecodeError) as caught:
        _raises()
    line = _raises.__code__.co_firstlineno + 1
    assert last_user_line(caught.value) == f"{pathlib.Path(__file__).resolve()}:{line}"
    assert last_model_line(caught.value) == last_user_line(caught.value)


def test_whoever_called_this_tool_is_not_the_user(tools):
    """The error is PyTorch's; the only other frames are this test's and the tool's."""
    with pytest.raises(moe_export.errors.UsageError) as caught:
        tools.subject(torch.nn.Linear(4, 4), torch.ones(2, 5))
    assert last_user_line(caught.value.__cause__) is None


TRACE = """
  File "{library}", line 10, in forward
  File "{mine}", line 20, in forward
  File "{library}", line 30, in linear
"""


def test_the_line_of_a_traced_node():
    mine = pathlib.Path(__file__).resolve()
    assert line_of(TRACE.format(library=torch.__file__, mine=mine)) == f"{mine}:20"
    library = pathlib.Path(torch.__file__).resolve()
    assert line_of(f'  File "{library}", line 30, in linear\n') == f"{library}:30"
    assert line_of(None) is None
    assert line_of("no frame here") is None
