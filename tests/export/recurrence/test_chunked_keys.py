"""A decay for each key, and states fed with what is read from them: right around every chunk's end, whatever decays."""

from __future__ import annotations

import functools
import random

import fed_loops as ways
import linear_loops
import numpy as np
import pytest
import torch
from linear_loops import run
from slow_cases import only
from torch import Tensor

from moe_export.errors import NotExportableError
from moe_export.export import stages
from moe_export.export.frontend.subject import Subject
from moe_export.export.pipeline import Graph
from moe_export.export.scans.expand import Expansion
from moe_export.export.scans.key_decays import KEY_STEPS
from moe_export.export.scans.segments import STEPS

T = KEY_STEPS
LENGTHS = (1, 2, T - 1, T, T + 1, STEPS - 1, STEPS, STEPS + 1, 5 * STEPS + 3)
MAIN = ["gla", "rwkv7"]


@functools.cache
def exported(name: str, recurrence: str = "chunked", *sizes: int) -> tuple[Subject, Graph]:
    step = ways.LOOPS[name] if name in ways.LOOPS else ways.REFUSED[name][0]
    return linear_loops.exported(ways.FromState(step), ways.inputs(name, *sizes), recurrence=recurrence)


def error(subject: Subject, graph: Graph, inputs: dict[str, Tensor]) -> float:
    """The largest of the output and the last state against the model in float64; relative where values are large."""
    with torch.no_grad():
        wanted = subject.module.double()(*(value.double() for value in inputs.values()))
    subject.module.float()
    found = 0.0
    for want, got in zip(wanted, run(graph, inputs), strict=True):
        assert tuple(want.shape) == got.shape
        assert np.isfinite(got).all()
        scale = max(1.0, want.abs().max().item())
        found = max(found, float(np.abs(got - want.numpy()).max(initial=0.0)) / scale)
    return found


@pytest.mark.parametrize("name", only(MAIN, ways.LOOPS))
def test_it_is_right_around_every_chunk_s_end(name: str) -> None:
    subject, graph = exported(name)
    assert {node.domain for node in graph.model.graph.all_nodes()} == {""}
    for length in LENGTHS:
        for batch in (1, 3):
            assert error(subject, graph, ways.example(name, length, batch, 0.3)) < 3e-6, (length, batch)


@pytest.mark.parametrize("name", only(MAIN, [*MAIN, "gla_before", "key_delta", "matrix_from_the_left"]))
@pytest.mark.parametrize("strongest", [0.0, 1e-3, 40.0, 1000.0, 1e30])
def test_strong_and_no_decay_are_as_exact_as_step_by_step(name: str, strongest: float) -> None:
    """Down to decays that are 0, side by side with those that are 1."""
    inputs = ways.example(name, 5 * STEPS + 3, 2, strongest)
    here, there = (error(*exported(name, form), inputs) for form in ("chunked", "scan"))
    assert here < 2 * there + 1e-6


@pytest.mark.parametrize("name", only(MAIN, ways.LOOPS))
def test_some_tokens_after_others_are_as_all_at_once(name: str) -> None:
    """A decoder's use: the last state is the next run's first."""
    graph = exported(name)[1]
    inputs = ways.example(name, 70, 2, 0.5)
    whole, last = run(graph, inputs)
    parts, start, state = [], 0, inputs["s"]
    for length in (1, 5, T, 2 * T + 1, 15):
        part = {key: value[:, start : start + length].contiguous() for key, value in inputs.items()}
        y, after = run(graph, part | {"s": state})
        state, start = torch.from_numpy(after), start + length
        parts.append(y)
    assert start == 70
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(state.numpy(), last, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("seed", only([0], range(6)))
def test_any_sizes(seed: int) -> None:
    """Heads, keys and values of any number, 1 included."""
    choose = random.Random(seed)
    for name in MAIN:
        sizes = choose.choice((1, 2, 5)), choose.choice((1, 3, 8, 17)), choose.choice((2, 7, 32))
        subject, graph = exported(name, "chunked", *sizes)
        for _ in range(4):
            length, strongest = choose.randint(1, 100), choose.choice((0.1, 3.0, 100.0))
            inputs = ways.example(name, length, choose.choice((1, 2, 4)), strongest, *sizes)
            assert error(subject, graph, inputs) < 5e-6, (name, sizes, length, strongest)


@pytest.mark.parametrize("name", [*ways.REFUSED])
@pytest.mark.slow_but_one
def test_what_has_no_chunked_form_says_why(name: str) -> None:
    with pytest.raises(NotExportableError, match=ways.REFUSED[name][1]):
        exported(name)


@pytest.mark.parametrize(
    ("name", "values", "taken"),
    [("gla", 32, True), ("gla", 8, False), ("rwkv7", 16, True), ("signed", 32, False)],
)
def test_auto_takes_it_where_a_decay_serves_many_values_and_is_known(
    name: str, values: int, taken: bool
) -> None:
    notes = exported(name, "auto", 2, 4, values)[1].notes
    assert any(f"products over chunks of {T} steps" in note for note in notes) == taken


def test_a_graph_that_runs_single_tokens_keeps_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk takes as long as several steps."""
    monkeypatch.setattr(stages, "Expansion", lambda *_: Expansion("auto", single_steps=True))
    for name in ("gla", "rwkv7"):
        module, inputs = ways.FromState(ways.LOOPS[name]), ways.inputs(name, 2, 4, 32)
        notes = linear_loops.exported(module, inputs)[1].notes
        assert not any("products over chunks" in note for note in notes), name
