"""Code that lists its pairs by `nonzero` is understood as experts, however it sorts, counts and splits them."""

from __future__ import annotations

from pathlib import Path

import dispatchers as models
import numpy as np
import pytest
import torch
from opened import session_of, subject_of
from slow_cases import only, slow

from moe_export.export.experts.recognise import find_experts
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.trace import trace

EXPORTED = [(models.SortedColumns, 2), (models.Stacked, 3)]
ALL = [*((each, 2) for each in models.DISPATCHED), (models.Stacked, 3), (models.SortedColumns, 1)]
ALL += [(models.SortedColumns, 6), (models.FromBelow, 6), (models.ExpertsFirst, 1)]


def name_of(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("idiom", "k"), only(EXPORTED, ALL), ids=name_of)
def test_every_order_of_listed_pairs_is_understood_and_right(idiom, k):
    module = idiom(k).eval()
    graph = export_subject(subject_of(module), Options(gates=False, simplify=False))[0]
    (note,) = graph.notes
    assert note.startswith(f"6 experts at {Path(models.__file__)}:")
    assert "lowered as" in note
    assert "NonZero" not in {node.op_type for node in graph.model.graph.all_nodes()}
    session, without, missed = session_of(graph.model), 0, 0
    for tokens in (0, 1, 3, 15, 64, 257):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected, exact = module(x).numpy(), module.reference(x).numpy()
            chosen = module.gates(x[0]) != 0
        without += int((~chosen.any(1)).sum())
        missed += int((~chosen.any(0)).sum())
        (got,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)
    assert missed > 0
    gated = idiom.gates in (models.Dispatched.gates, models.NoChoice.gates)
    assert without > 0 or k == 6 or not gated  # tokens whose gates are all 0 get nothing


TRACED = [each for each in models.DISPATCHED if each is not models.SortedColumns]


@pytest.mark.parametrize("idiom", only(TRACED[2:6], TRACED), ids=name_of)
def test_the_pairs_are_those_of_the_choice(idiom):
    """As many pairs a token as it has choices, each read by token and slot; without a choice, as many as experts."""
    program = trace(subject_of(idiom().eval())).program
    _, (block,), refused = find_experts(program)
    assert refused == ()
    assert block.count == 6
    chosen = idiom not in (models.NoChoice, models.TwoChoices)
    assert block.indices.meta["val"].shape[1] == (2 if chosen else 6)
    tokens = block.indices.meta["val"].shape[0]
    assert {str(node.meta["val"].shape[0]) for node in block.shared} == {str(tokens)}


@pytest.mark.parametrize("lowering", ["blocks", slow("gather"), slow("dense"), slow("loop")])
def test_each_lowering_leaves_out_gates_of_0(lowering):
    module = models.SortedColumns(3).eval()
    graph = export_subject(subject_of(module), Options(experts=lowering, gates=False, simplify=False))[0]
    session = session_of(graph.model)
    for tokens in (1, 7, 64):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gates_that_may_be_negative_are_not_taken_for_counted():
    """Negative gates are listed, and not counted; where PyTorch can split the list, the graph is right."""
    module = models.Signed().eval()
    session = session_of(export_subject(subject_of(module), Options(gates=False))[0].model)
    for tokens in (1, 7, 64):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5)
