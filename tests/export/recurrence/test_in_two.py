"""Loops whose first states read no others: these alone, then the others over chunks. Right at any length and decay."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import linear_loops
import maximum_loops as ways
import numpy as np
import pytest
import torch
from linear_loops import run
from slow_cases import only
from torch import Tensor

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import Subject
from moe_export.export.pipeline import Graph

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 163)


@functools.cache
def exported(name: str, recurrence: str = "chunked", *sizes: int) -> tuple[Subject, Graph]:
    module = ways.MEMORIES[name]()
    inputs = tuple(ways.inputs(*sizes).values())
    return linear_loops.exported(module, inputs, recurrence=recurrence)


def example(length: int, batch: int, strongest: float, *sizes: int) -> dict[str, Tensor]:
    """Other values: logarithms of decays from -strongest to 0, some of them 0; odd lengths start from nothing."""
    choose = torch.Generator().manual_seed(1000 * length + batch)
    found = {}
    for key, value in ways.inputs(*sizes).items():
        shape = (batch, *value.shape[1:]) if key in "cnm" else (batch, length, *value.shape[2:])
        found[key] = torch.randn(shape, generator=choose)
    places = torch.rand(found["f"].shape, generator=choose)
    found["f"] = torch.where(places < 0.2, 0.0, -strongest * places)
    found["i"] = 4 * found["i"]
    if length % 2:
        found |= {key: torch.zeros_like(found[key]) for key in "cn"}
        found["m"] = torch.full_like(found["m"], -torch.inf)
    return found


def errors(subject: Subject, graph: Graph, inputs: dict[str, Tensor]) -> list[float]:
    """Of each output, against the model in float64 and relative to its largest value; infinities agree."""
    with torch.no_grad():
        wanted = subject.module.double()(*(value.double() for value in inputs.values()))
    subject.module.float()
    found = []
    for want, got in zip(wanted, run(graph, inputs), strict=True):
        assert tuple(want.shape) == got.shape
        there = np.isfinite(want.numpy())
        np.testing.assert_array_equal(got[~there], want.numpy()[~there])
        scale = np.abs(want.numpy()[there]).max(initial=1.0)
        found.append(float(np.abs(got[there] - want.numpy()[there]).max(initial=0.0)) / scale)
    return found


def assert_as_exact_as_step_by_step(name: str, examples: Sequence[dict[str, Tensor]], *sizes: int) -> None:
    """Every state, each time; what is read by the median, because it is divided by n q, which may nearly vanish.

    Then rounding alone decides on the error, up to ten times as large one time in one form and one time in the other.
    """
    here, there = (
        np.array([errors(*exported(name, form, *sizes), inputs) for inputs in examples])
        for form in ("chunked", "scan")
    )
    assert (here[:, 1:] < 2 * there[:, 1:] + 1e-6).all(), (here, there)
    assert np.median(here[:, 0]) < 2 * np.median(there[:, 0]) + 1e-6
    assert here[:, 0].max() < 1e-2


@pytest.mark.parametrize("name", only(["mlstm"], ways.MEMORIES))
def test_it_is_right_around_every_end(name: str) -> None:
    _, graph = exported(name)
    assert {node.domain for node in graph.model.graph.all_nodes()} == {""}
    assert_as_exact_as_step_by_step(
        name, [example(length, batch, 0.3) for length in LENGTHS for batch in (1, 3)]
    )


@pytest.mark.parametrize("name", only(["mlstm"], ways.MEMORIES))
@pytest.mark.parametrize("strongest", [0.0, 1e-3, 40.0, 1000.0, 1e30, torch.inf])
def test_strong_and_no_decay_are_as_exact_as_step_by_step(name: str, strongest: float) -> None:
    """Down to logarithms of -inf, side by side with those of 0."""
    examples = [example(length, 2, strongest) for length in range(155, 166)]
    for inputs in examples:
        inputs["f"] = inputs["f"].nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    assert_as_exact_as_step_by_step(name, examples)


def test_only_the_maximum_and_chunks_are_passed_on_one_by_one() -> None:
    """One Scan over all steps, of the maximum alone; those of the memory and its normaliser go from chunk to chunk."""
    _, graph = exported("mlstm")
    loops = [node for node in graph.model.graph.all_nodes() if node.op_type == "Scan"]
    bodies = sorted(sorted({inner.op_type for inner in node.attributes["body"].as_graph()}) for node in loops)
    assert bodies == [["Add", "Identity", "Max"], ["Add", "Identity", "Mul"], ["Add", "Identity", "Mul"]]
    assert any(
        "products over chunks of 32 steps, with what its first states give" in note for note in graph.notes
    )


@pytest.mark.parametrize("name", only(["mlstm"], ways.MEMORIES))
def test_some_tokens_after_others_are_as_all_at_once(name: str) -> None:
    """The last states are the next run's first."""
    graph = exported("mlstm")[1]
    inputs = example(70, 2, 0.5)
    whole, *last = run(graph, inputs)
    parts, start, states = [], 0, {key: inputs[key] for key in "cnm"}
    for length in (1, 5, 32, 17, 15):
        part = {key: inputs[key][:, start : start + length].contiguous() for key in "qkvif"}
        y, *after = run(graph, part | states)
        states, start = dict(zip("cnm", map(torch.from_numpy, after), strict=True)), start + length
        parts.append(y)
    assert start == 70
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-4, atol=2e-5)
    for key, value in zip("cnm", last, strict=True):
        np.testing.assert_allclose(states[key].numpy(), value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("seed", only([0], range(6)))
def test_any_sizes(seed: int) -> None:
    """Heads, keys and values of any number, where the memory is much larger than its maximum."""
    choose = random.Random(seed)
    for name in ways.MEMORIES:
        sizes = choose.choice((1, 2, 5)), choose.choice((2, 3, 8, 17)), choose.choice((17, 32))
        strongest = choose.choice((0.1, 3.0, 100.0))
        cases = [(choose.randint(1, 100), choose.choice((1, 2, 4))) for _ in range(9)]
        assert_as_exact_as_step_by_step(
            name, [example(length, batch, strongest, *sizes) for length, batch in cases], *sizes
        )


def test_small_memories_stay_a_scan() -> None:
    """What would be written for each step is no smaller than the states that are kept."""
    with pytest.raises(NotExportableError, match="Max of a state is not linear"):
        exported("mlstm", "chunked", 3, 2, 2)
    assert not any("chunks" in note for note in exported("mlstm", "auto", 3, 2, 2)[1].notes)


def test_auto_leaves_what_no_form_takes_as_one_scan() -> None:
    """Tried as two loops, and put back: chunks of 20 entries do not pay."""
    graph, scan = exported("mlstm", "auto")[1], exported("mlstm", "scan")[1]
    assert sum(node.op_type == "Scan" for node in graph.model.graph.all_nodes()) == 1
    assert not any("loop 0" in note for note in graph.notes)
    inputs = example(33, 2, 0.3)
    for here, there in zip(run(graph, inputs), run(scan, inputs), strict=True):
        np.testing.assert_array_equal(here, there)


def test_a_refusal_tells_of_the_other_states_too() -> None:
    """An einsum over one key is no sum but a product."""
    with pytest.raises(
        NotExportableError, match=r"Max of a state .*; its other states: Div mixes a state with"
    ):
        exported("backwards", "chunked", 2, 1, 17)
