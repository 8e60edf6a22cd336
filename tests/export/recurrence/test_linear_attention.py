"""Linear recurrences and delta rules as `com.microsoft.LinearAttention`: right at any length, refused with reasons."""

from __future__ import annotations

import functools

import attention_loops as ways
import linear_loops
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import only

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import Subject
from moe_export.export.pipeline import Graph

LENGTHS = (1, 2, 7, 33, 257)
# An export takes seconds: one loop of each rule is run every time.
REASONS = ["other_key", "held_is_handed_out", "many_small_heads", "added_instead"]
LOOPS = only(["gated_delta", "delta", "with_bonus", "half_read_before"], ways.LOOPS)


@functools.cache
def exported(name: str, recurrence: str = "contrib") -> tuple[Subject, Graph]:
    module, inputs = (ways.LOOPS.get(name) or ways.REFUSED.get(name) or linear_loops.REFUSED[name])[:2]
    return linear_loops.exported(module, inputs, int(name != "time_first"), recurrence=recurrence)


def operators(graph: Graph) -> list[ir.Node]:
    return [node for node in graph.model.graph.all_nodes() if node.op_type == "LinearAttention"]


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.slow_but_one
def test_it_is_right_at_any_length(name: str) -> None:
    subject, graph = exported(name)
    proto = ir.to_proto(graph.model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    module = subject.module
    for length in LENGTHS:
        for batch in (1, 3):
            inputs = linear_loops.example(subject, length, batch, int(name != "time_first"))
            found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
            with torch.no_grad():
                wanted = module.double()(*(value.double() for value in inputs.values()))
            module.float()
            for want, got in zip(wanted if isinstance(wanted, tuple) else [wanted], found, strict=True):
                assert tuple(want.shape) == got.shape
                error = np.abs(got - want.numpy()).max() / max(1.0, want.abs().max().item())
                assert error < 3e-6, (length, batch, error)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.slow_but_one
def test_a_state_is_one_operator_and_no_scan(name: str) -> None:
    graph = exported(name)[1]
    found = operators(graph)
    assert len(found) == (2 if name == "linear_attention" else 1)
    assert {node.attributes["update_rule"].as_string() for node in found} == {ways.LOOPS[name][2]}
    assert not any(node.op_type == "Scan" for node in graph.model.graph.all_nodes())
    assert any("com.microsoft.LinearAttention" in note for note in graph.notes), graph.notes


@pytest.mark.parametrize("name", only(REASONS, [*ways.REFUSED, "signed", "squashed"]))
@pytest.mark.slow_but_one
def test_what_the_operator_does_not_compute_says_why(name: str) -> None:
    expected = (ways.REFUSED.get(name) or linear_loops.REFUSED[name])[2]
    with pytest.raises(NotExportableError, match=expected) as caught:
        exported(name)
    assert "loops.py" in str(caught.value.where)


@pytest.mark.parametrize("name", only(["gated_delta"], ["mamba2", "gated_delta", "decay_a_key"]))
@pytest.mark.slow
def test_auto_writes_no_operator_of_one_runtime(name: str) -> None:
    graph = exported(name, "auto")[1]
    assert {node.domain for node in graph.model.graph.all_nodes()} == {""}
