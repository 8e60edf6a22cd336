"""All experts compute all tokens, and the results of the chosen ones are picked: the chosen pairs are enough."""

from __future__ import annotations

import math

import numpy as np
import picked as models
import pytest
import torch
from opened import session_of, subject_of
from slow_cases import only

from moe_export.export.experts import picked
from moe_export.export.experts.flat_tokens import with_flat_tokens
from moe_export.export.experts.recognise import find_experts
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.sizes import same_size
from moe_export.export.tracing.trace import trace

EXPORTED = [models.Gathered, models.ExpertsInFront, models.KeepsAxes]
TRACED = [idiom for idiom in models.PICKED if idiom not in EXPORTED]


@pytest.mark.parametrize("idiom", only(EXPORTED, models.PICKED), ids=lambda idiom: idiom.__name__)
def test_the_chosen_pairs_are_computed_and_nothing_else(idiom):
    module = idiom().eval()
    graph = export_subject(subject_of(module), Options(gates=False, simplify=False))[0]
    (note,) = [note for note in graph.notes if "experts at" in note]
    assert note.startswith(f"6 experts at {models.__file__}:")
    assert "lowered as" in note
    session = session_of(graph.model)
    none = [(1, 0)] if "moe" in vars(idiom) else []  # of one axis of tokens
    for batch, tokens in (*none, (1, 1), (2, 5), (3, 7), (1, 64)):
        x = torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            exact = module.reference(x).numpy()
        (got,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("idiom", only(TRACED, models.PICKED), ids=lambda idiom: idiom.__name__)
def test_the_block_is_that_of_the_choice(idiom):
    """Of k experts a token, whose body reads N rows and the weights as they are stored."""
    program = trace(subject_of(idiom().eval())).program
    _, (block,), notes = find_experts(with_flat_tokens(program) or program)
    assert notes == ()
    assert (block.count, block.slots) == (6, idiom().k)
    tokens = block.indices.meta["val"].shape[0]
    assert same_size(tokens, math.prod(program.graph.find_nodes(op="placeholder")[-1].meta["val"].shape[:2]))
    weights = [node for weight in block.weights for node in weight.separate or (weight.stack,)]
    assert all(node.op == "placeholder" for node in weights)


class Scaled(models.Gathered):
    """The result times a number that two free sizes decide: no tensor, which a block could take."""

    def forward(self, x):
        return super().forward(x) * math.sqrt(x.shape[1]) / (x.shape[0] * x.shape[1]) ** 0.25


def test_a_number_that_sizes_decide_stays_outside_of_a_block():
    module = Scaled().eval()
    graph = export_subject(subject_of(module), Options(gates=False, simplify=False))[0]
    assert [note.split(":")[0] for note in graph.notes if "experts at" in note] == [
        f"6 experts at {models.__file__}"
    ]
    session = session_of(graph.model)
    for batch, tokens in ((1, 1), (2, 5), (3, 64)):
        x = torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            exact = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("idiom", models.NOT_PICKED, ids=lambda idiom: idiom.__name__)
def test_what_picks_anything_else_stays(idiom):
    _, blocks, _ = find_experts(trace(subject_of(idiom().eval())).program)
    assert blocks == ()


@pytest.mark.parametrize("idiom", models.SLOTS_APART, ids=lambda idiom: idiom.__name__)
def test_slots_that_differ_in_more_than_their_expert_are_blocks_of_their_own(idiom):
    _, blocks, _ = find_experts(trace(subject_of(idiom().eval())).program)
    assert [block.slots for block in blocks] == [1, 1]


class RowsTimesWeights(torch.nn.Module):
    """Each row times the weights of its expert: no pick of some of all results, though the sum is over an axis, too."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(16, 6)
        self.weights = torch.nn.Parameter(torch.randn(6, 16, 16) / 4)

    def forward(self, x):
        rows = x.reshape(-1, 16)
        expert = self.router(rows).argmax(-1)
        return torch.bmm(rows.unsqueeze(1), self.weights[expert]).view(x.shape)


def test_a_product_of_rows_is_no_pick_and_costs_no_trial(monkeypatch):
    """A trial makes random values of a stack's size, which may be gigabytes."""
    tried = []
    monkeypatch.setattr(picked, "check", lambda one, instead: tried.append(one))
    program = trace(subject_of(RowsTimesWeights().eval())).program
    assert [block.count for block in find_experts(program)[1]] == [6]
    assert not tried
    program = trace(subject_of(models.Gathered().eval())).program
    find_experts(with_flat_tokens(program) or program)
    assert tried
