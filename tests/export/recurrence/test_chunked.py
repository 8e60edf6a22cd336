"""Linear recurrences as products over chunks: right at any length, as exact as step by step, refused with reasons."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import linear_loops as ways
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import one_in, only, slow

from moe_export.errors import NotExportableError
from moe_export.export.engines.build import build_engines
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.lengths import Length

UNEVEN = (1, 2, 7, 31, 32, 33, 64, 257)


@functools.cache
def exported(name: str, recurrence: str, unroll: int = 1) -> tuple[Subject, Graph]:
    module, inputs = (ways.LOOPS.get(name) or ways.REFUSED[name])[:2]
    return ways.exported(module, inputs, int(name != "time_first"), recurrence=recurrence, unroll=unroll)


def session(graph: Graph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    proto = ir.to_proto(graph.model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def exact(subject: Subject, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The model in float64."""
    subject.module.double()
    try:
        with torch.no_grad():
            found = subject.call_named({name: tensor.double() for name, tensor in inputs.items()})
    finally:
        subject.module.float()
    return [tensor.numpy() for tensor in found]


# An export takes seconds.
@pytest.fixture(scope="module", params=only(["mamba2"], ways.LOOPS))
def way(request: pytest.FixtureRequest) -> tuple[str, Subject, Graph]:
    return (request.param, *exported(request.param, "chunked"))


def test_it_is_right_at_any_length(way: tuple[str, Subject, Graph]) -> None:
    name, subject, graph = way
    runtime = session(graph)
    for length in UNEVEN:
        for batch in (1, 3):
            inputs = ways.example(subject, length, batch, 0 if name == "time_first" else 1)
            found = runtime.run(None, {key: tensor.numpy() for key, tensor in inputs.items()})
            for wanted, result in zip(exact(subject, inputs), found, strict=True):
                assert wanted.shape == result.shape
                error = np.abs(result - wanted).max() / max(1.0, np.abs(wanted).max())
                assert error < 2e-6, (length, batch, error)


def test_only_the_states_of_chunks_are_passed_on_one_by_one(way: tuple[str, Subject, Graph]) -> None:
    _, _, graph = way
    scans = [node for node in graph.model.graph.all_nodes() if node.op_type == "Scan"]
    assert scans
    for scan in scans:
        assert len(list(scan.attributes["body"].as_graph())) <= 3
    assert {node.domain for node in graph.model.graph.all_nodes()} == {""}
    assert any("products over chunks" in note for note in graph.notes)


@pytest.mark.parametrize("name", list(ways.REFUSED))
def test_what_has_no_chunked_form_says_why(name: str) -> None:
    with pytest.raises(NotExportableError, match=ways.REFUSED[name][2]) as caught:
        exported(name, "chunked")
    assert "linear_loops.py" in str(caught.value.where)


def test_auto_leaves_step_by_step_what_has_no_chunked_form() -> None:
    graph = exported("per_entry", "auto")[1]
    assert not any("chunks" in note for note in graph.notes)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 3.0), slow((0.0, 1e-3)), slow((10.0, 10.0)), slow((0.0, 0.0))],
)
@pytest.mark.slow
def test_strong_and_no_decay_as_exact_as_step_by_step(low: float, high: float) -> None:
    """dt * A down to -48 a step, at dt = 10 to -160: each segment of a chunk is summed by itself."""
    subject, chunked = exported("mamba2", "chunked")
    scan = exported("mamba2", "scan")[1]
    inputs = ways.example(subject, 512, 2)
    inputs["dt"] = low + (high - low) * torch.rand(2, 512, ways.H, generator=torch.Generator().manual_seed(0))
    (wanted,) = exact(subject, inputs)
    feed = {key: tensor.numpy() for key, tensor in inputs.items()}
    errors = []
    for graph in (chunked, scan):
        found = session(graph).run(None, feed)[0]
        assert np.isfinite(found).all()
        errors.append((np.abs(found - wanted) / np.maximum(1.0, np.abs(wanted))).max())
    assert max(errors) < 1e-5
    assert errors[0] < 2 * errors[1] + 1e-6


def test_a_decay_of_exactly_zero_forgets_and_is_no_nan() -> None:
    subject, graph = exported("mamba2", "chunked")
    inputs = ways.example(subject, 40, 1)
    inputs["dt"][:, ::7] = 1e30  # exp(-1e30 * A) is 0, and what is added is huge but finite
    inputs["x"][:, ::7] = 0.0
    found = session(graph).run(None, {key: tensor.numpy() for key, tensor in inputs.items()})[0]
    with torch.no_grad():
        (wanted,) = subject.call_named(inputs)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "unroll"),
    one_in(
        5, [("mamba2_outside", 5), ("squashed", 2), ("backwards", 2), ("time_first", 5), ("retention", 3)]
    ),
)
def test_several_steps_an_iteration(name: str, unroll: int) -> None:
    """With what is left over, and the last state after the last step that there is."""
    subject, graph = exported(name, "scan", unroll)
    runtime = session(graph)
    for length in (1, 2, 3, 5, 9, 10, 33):
        inputs = ways.example(subject, length, 3, 0 if name == "time_first" else 1)
        found = runtime.run(None, {key: tensor.numpy() for key, tensor in inputs.items()})
        for wanted, result in zip(exact(subject, inputs), found, strict=True):
            assert wanted.shape == result.shape
            np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_form_does_not_depend_on_the_length_of_the_example() -> None:
    module, inputs = ways.LOOPS["mamba2"]
    sizes = set()
    for length in (6, 10, 70):
        subject = make_subject(module, inputs, {}, source=Path(ways.__file__), how="a test")
        axes = Length(tuple((name, 1) for name in subject.inputs))
        resized = tuple(axes.resized(subject.inputs, length).values())
        subject = make_subject(module, resized, {}, source=Path(ways.__file__), how="a test")
        free = {(name, 0): "batch" for name in subject.inputs} | {
            (name, 1): "sequence" for name in subject.inputs
        }
        options = Options(
            dims=DimRequest(static=True, picked=free), gates=False, simplify=False, recurrence="chunked"
        )
        graph = export_subject(subject, options)[0]
        sizes.add(tuple(sorted(node.op_type for node in graph.model.graph.all_nodes())))
        assert {shape[1] for shape in graph.traced.inputs.values()} == {"sequence"}
    assert len(sizes) == 1


@pytest.mark.slow
def test_a_long_example_exports_as_fast_as_a_short_one() -> None:
    module, inputs = ways.LOOPS["mamba2"]
    seconds, sizes = [], set()
    for length in (16, 16, 4096):  # the first run loads what all need
        subject = make_subject(module, inputs, {}, source=Path(ways.__file__), how="a test")
        axes = Length(tuple((name, 1) for name in subject.inputs))
        resized = tuple(axes.resized(subject.inputs, length).values())
        subject = make_subject(module, resized, {}, source=Path(ways.__file__), how="a test")
        start = time.process_time()
        graph = export_subject(subject, Options(gates=False, simplify=False))[0]
        seconds.append(time.process_time() - start)
        sizes.add(len(ir.to_proto(graph.model).SerializeToString()))
    assert seconds[2] < 1.5 * seconds[1]
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize(
    ("recurrence", "unroll"),
    [slow(("scan", 1)), slow(("scan", 4)), slow(("chunked", 1))],
    ids=["scan", "unroll", "chunked"],
)
def test_engines_take_any_length_to_4096(recurrence, unroll):
    _, graph = exported("mamba2", recurrence, unroll)
    ranges = {"batch": (1, 1, 1), "sequence": (1, 512, 4096)}
    (engine,) = build_engines(graph.model, ["sm89"], ranges)
    assert 0 < engine.size < 16 * 2**20
