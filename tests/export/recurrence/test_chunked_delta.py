"""Delta rules as products over chunks: right around every chunk's end, and as exact as step by step."""

from __future__ import annotations

import functools

import attention_loops as ways
import linear_loops
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import only
from torch import Tensor

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import Subject
from moe_export.export.pipeline import Graph
from moe_export.export.scans.chunked_delta import inverse_of_unit
from moe_export.export.scans.segments import STEPS
from moe_export.graph_builder import GraphBuilder

LENGTHS = (1, 2, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS, 200)
RULES = ["gated_delta", "delta", "delta_key_scaled", "multiplied_out", "online_gradient", "rate_a_value"]


@functools.cache
def exported(name: str, recurrence: str) -> tuple[Subject, Graph]:
    module, inputs = (ways.LOOPS.get(name) or ways.REFUSED[name])[:2]
    return linear_loops.exported(module, inputs, recurrence=recurrence)


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def errors(subject: Subject, graph: Graph, inputs: dict[str, Tensor]) -> list[float]:
    """Of each output, against the model in float64; relative where values are large."""
    found = session(graph.model).run(None, {key: value.numpy() for key, value in inputs.items()})
    with torch.no_grad():
        wanted = subject.module.double()(*(value.double() for value in inputs.values()))
    subject.module.float()
    results = []
    for want, got in zip(wanted, found, strict=True):
        assert tuple(want.shape) == got.shape
        assert np.isfinite(got).all()
        results.append((np.abs(got - want.numpy()) / np.maximum(1, want.abs().numpy())).max(initial=0.0))
    return results


def fading(subject: Subject, length: int, batch: int, weakest: float, strongest: float) -> dict[str, Tensor]:
    """Inputs with decays between exp(-strongest) and exp(-weakest)."""
    inputs = linear_loops.example(subject, length, batch)
    if "g" in inputs:
        chosen = torch.rand(inputs["g"].shape, generator=torch.Generator().manual_seed(length))
        inputs["g"] = -weakest - (strongest - weakest) * chosen
    return inputs


@pytest.mark.parametrize("name", only(["gated_delta"], RULES))
def test_it_is_right_around_every_chunk_s_end(name: str) -> None:
    subject, graph = exported(name, "chunked")
    for length in LENGTHS:
        for batch in (1, 3):
            inputs = fading(subject, length, batch, 0.0, 0.2)
            assert max(errors(subject, graph, inputs)) < 3e-6, (length, batch)


@pytest.mark.parametrize(
    ("weakest", "strongest"),
    [(0.0, 0.0), (0.0, 1e-3), (0.0, 40.0), (80.0, 80.0), (1e30, 1e30)],
)
def test_strong_and_no_decay_are_as_exact_as_step_by_step(weakest: float, strongest: float) -> None:
    """Down to decays that underflow in one step, and to those that are exactly 0."""
    subject, chunked = exported("gated_delta", "chunked")
    inputs = fading(subject, 200, 2, weakest, strongest)
    by_steps = exported("gated_delta", "scan")[1]
    here, there = (max(errors(subject, graph, inputs)) for graph in (chunked, by_steps))
    assert here < 2 * there + 1e-6


def test_keys_that_are_all_alike_keep_their_digits() -> None:
    """The sum of powers of L, which also is the inverse of I + L, loses all of them here."""
    subject, chunked = exported("gated_delta", "chunked")
    inputs = fading(subject, 200, 1, 0.0, 0.0)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.ones_like(inputs["beta"])
    assert max(errors(subject, chunked, inputs)) < 5e-6


def test_the_inverse_of_a_triangle() -> None:
    matrix = np.random.default_rng(0).standard_normal((3, STEPS, STEPS))
    value = ir.Value(name="minus", type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape(matrix.shape))
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 17})
    builder = GraphBuilder(graph, "triangle", typed=True)
    graph.outputs.append(inverse_of_unit(builder, value, STEPS))
    graph.extend(builder.nodes)
    (found,) = session(ir.Model(graph, ir_version=10)).run(None, {"minus": matrix})
    wanted = np.linalg.inv(np.eye(STEPS) - np.tril(matrix, -1))
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())


def scans(graph: Graph) -> list[ir.Node]:
    return [node for node in graph.model.graph.all_nodes() if node.op_type == "Scan"]


def test_a_scan_passes_the_states_of_chunks_on() -> None:
    graph = exported("gated_delta", "chunked")[1]
    (scan,) = scans(graph)
    kinds = [node.op_type for node in scan.attributes["body"].as_graph()]
    assert kinds.count("MatMul") == 3
    assert {node.domain for node in graph.model.graph.all_nodes()} == {""}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("held_is_handed_out", "returned, too"), ("many_small_heads", "decay differs along the axes")],
)
@pytest.mark.slow_but_one
def test_what_has_no_chunked_form_says_why(name: str, reason: str) -> None:
    with pytest.raises(NotExportableError, match=reason):
        exported(name, "chunked")
