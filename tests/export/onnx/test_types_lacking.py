"""What ONNX lacks in bfloat16 at an opset is computed in float32, and gives what PyTorch gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.types_lacking import in_float32
from moe_export.export.pipeline import Options, export_subject


class Chosen(nn.Module):
    def forward(self, x):
        values, places = x.topk(3)
        return values, places


class Summed(nn.Module):
    """A loop whose body is a graph of its own."""

    def forward(self, x):
        state, states = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = torch.nn.functional.softplus(x[:, step]) - 0.5 * state
            states.append(state)
        return torch.stack(states, 1)


def graph_of(module, opset):
    example = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    subject = make_subject(module, (example,), {}, source=Path(__file__), how="test")
    return export_subject(subject, Options(opset=opset, gates=False, simplify=False))[0].model, example


def types_in(model, operator):
    return {node.inputs[0].dtype for node in model.graph.all_nodes() if node.op_type == operator}


@pytest.mark.parametrize(("opset", "expected"), [(17, ir.DataType.FLOAT), (24, ir.DataType.BFLOAT16)])
def test_only_what_is_lacking_is_widened(opset, expected):
    model, _ = graph_of(Chosen(), opset)
    assert types_in(model, "TopK") == {expected}
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.BFLOAT16, ir.DataType.INT64}


def test_the_body_of_a_loop_is_widened_too():
    model, _ = graph_of(Summed(), 17)
    assert types_in(model, "Softplus") == {ir.DataType.FLOAT}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


class Filled(nn.Module):
    """A buffer of its own, as rows of experts are written into."""

    def forward(self, x):
        return torch.cat([x.new_zeros(x.shape[0], 2), x.new_full((x.shape[0], 1), 0.2), x], 1)


@pytest.mark.parametrize(("opset", "expected"), [(17, ir.DataType.FLOAT), (24, ir.DataType.BFLOAT16)])
def test_what_is_filled_is_of_a_type_that_the_opset_has(opset, expected):
    model, _ = graph_of(Filled(), opset)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    made = [node for node in model.graph.all_nodes() if node.op_type == "ConstantOfShape"]
    assert {node.attributes["value"].as_tensor().dtype for node in made} <= {expected}
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.BFLOAT16}


def test_what_is_chosen_is_what_pytorch_chooses():
    model, example = graph_of(Chosen(), 17)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        example.view(torch.int16).numpy(), onnx.TensorProto.BFLOAT16
    )
    values, places = session.run_with_ort_values(None, {"x": given})
    expected = Chosen()(example)
    np.testing.assert_array_equal(places.numpy(), expected[1].numpy())
    assert values.data_type() == "tensor(bfloat16)"


def test_a_graph_in_float32_is_left_alone():
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3])) for name in "xy"
    ]
    node = ir.node("Softplus", [values[0]], outputs=[values[1]])
    graph = ir.Graph([values[0]], [values[1]], nodes=[node], opset_imports={"": 17})
    assert in_float32(ir.Model(graph, ir_version=10), 17) == 0
    assert [each.op_type for each in graph] == ["Softplus"]
