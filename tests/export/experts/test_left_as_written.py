"""Code that dispatches, and is no block, is told which value lost its meaning, at which line and operator."""

from __future__ import annotations

import inspect
import re

import pytest
import unrecognised as models
from opened import subject_of

from moe_export.export.experts.recognise import find_experts
from moe_export.export.tracing.trace import trace


def line_in(note: str) -> str:
    """The source of the last line that a note names."""
    line = int(re.findall(rf"{re.escape(models.__file__)}:(\d+)", note)[-1])
    return inspect.getsource(models).splitlines()[line - 1]


@pytest.mark.parametrize(
    ("idiom", "says", "source"),
    [
        (
            models.ByThreshold,
            "no choice among experts is seen that its rows come from, which `where`",
            "torch.where(",
        ),
        (
            models.ByOddNumbers,
            "of which tokens and experts the result of `where`",
            "token, slot = torch.where(",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_dispatch_that_is_no_block_says_where_its_meaning_was_lost(idiom, says, source):
    blocks, (note,) = find_experts(trace(subject_of(idiom().eval())).program.graph)
    assert blocks == ()
    assert note.startswith(f"the code of the experts at {models.__file__}:")
    assert " stays as it was written: " in note
    assert says in note
    assert source in line_in(note)


def test_rows_of_one_layer_are_no_experts():
    assert find_experts(trace(subject_of(models.NoExperts().eval())).program.graph) == ((), ())
