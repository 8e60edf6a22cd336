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


LOST = {
    models.ByThreshold: (
        "no choice among experts is seen that its rows come from, which `where`",
        "torch.where(",
    ),
    models.ByOddNumbers: (
        "of which tokens and experts the result of `where`",
        "token, slot = torch.where(",
    ),
    models.ByOrder: ("stay products, as they were written: the slot that `remainder`", ".long() % 4"),
    models.Mixing: ("what pairs get depends on other pairs, after `flip`", "rows.flip(1)"),
    models.AllAtAll: ("of which tokens and experts the result of `gather`", "rows.gather(1"),
    models.NotZero: ("of which tokens and experts the result of `einsum`", 'einsum("ne,end->nd"'),
    models.IntoGrid: ("of which tokens and experts the result of `index_put`", "grid.index_put("),
    models.IntoBuffer: ("of which tokens and experts the result of `index_add`", "buffer.index_add_("),
    models.ModulesOnBuffer: ("of which tokens and experts the result of `index_add`", ".index_add(0, to, x)"),
    models.ExpertsChoose: ("its experts choose their tokens, by `topk`", ".topk(2, 0)"),
    models.ModulesChoose: ("its experts choose their tokens, by `topk`", ".topk(2, 0)"),
    models.MasksOfChoosers: ("its experts choose their tokens, by `topk`", ".topk(2, -1)"),
    models.FirstRows: ("of which tokens and experts the result of `slice`", "[:, 0][:3]"),
}
"""Each way to dispatch: what the note says, and what stands on the line that it names."""


@pytest.mark.parametrize("idiom", LOST, ids=lambda idiom: idiom.__name__)
def test_a_dispatch_that_is_no_block_says_where_its_meaning_was_lost(idiom):
    says, source = LOST[idiom]
    _, blocks, (note,) = find_experts(trace(subject_of(idiom(experts=3).eval())).program)
    assert blocks == ()
    assert f" experts at {models.__file__}:" in note
    assert " as it was written: " in note or " as they were written: " in note
    assert says in note
    assert source in line_in(note)


def test_each_of_two_blocks_has_a_note():
    _, blocks, notes = find_experts(trace(subject_of(models.TwoBlocks(experts=3).eval())).program)
    assert blocks == ()
    assert sorted(re.findall(r"the result of `(\w+)`", " ".join(notes))) == ["gather", "slice"]


@pytest.mark.parametrize(
    ("model", "count"), [(models.NoExperts, 0), (models.Classifier, 0), (models.Understood, 1)]
)
def test_nothing_is_said_of_what_is_understood_or_no_dispatch(model, count):
    _, blocks, notes = find_experts(trace(subject_of(model().eval())).program)
    assert (len(blocks), notes) == (count, ())
