"""`TRT_MoE`: TensorRT's parser takes it for its own layer, ONNX Runtime for what it means."""

from __future__ import annotations

from pathlib import Path

import experts_idioms as idioms
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.engines.build import build_engines
from moe_export.export.engines.graph_file import read_graph
from moe_export.export.engines.rules import find_refusals
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.export.pipeline import Options, export_subject

trt = pytest.importorskip("tensorrt_rtx", reason="the parser that knows TRT_MoE is TensorRT-RTX's")


class Gated(nn.Module):
    def __init__(self, d: int = 16, hidden: int = 24):
        super().__init__()
        self.w1, self.w3 = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.w2 = nn.Linear(hidden, d, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class SwiGLU(idioms.SkipEmpty):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Gated() for _ in range(self.num_experts))


def exported(module: nn.Module, **options: str):
    torch.manual_seed(1)
    subject = make_subject(module.eval(), (torch.randn(2, 5, 16),), {}, source=Path(__file__), how="test")
    return export_subject(subject, Options(gates=False, **options))[0]


def test_the_parser_makes_its_own_layer_of_it():
    graph = exported(SwiGLU(), target="tensorrt-sm100")
    (note,) = [note for note in graph.notes if "experts at" in note]
    assert note.endswith("(lowered as 'trt_moe')")
    proto = ir.to_proto(graph.model)
    onnx.checker.check_model(proto, full_check=True)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(proto.SerializeToString()), [
        parser.get_error(i).desc() for i in range(parser.num_errors)
    ]
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    (layer,) = [layer for layer in layers if layer.type == trt.LayerType.MOE]
    layer.__class__ = trt.IMoELayer
    assert layer.activation_type == trt.MoEActType.SILU
    shapes = [tuple(layer.get_input(number).shape) for number in range(layer.num_inputs)]
    assert shapes == [(1, -1, 16), (1, -1, 2), (1, -1, 2), (6, 16, 24), (6, 16, 24), (6, 24, 16)]
    assert layer.get_input(1).dtype == trt.DataType.INT32


def test_a_string_would_be_no_activation():
    """Why the activation is written as a number: the parser takes anything else for none."""
    proto = ir.to_proto(exported(SwiGLU(), target="tensorrt-sm100").model)
    (node,) = [node for node in proto.graph.node if node.op_type == "TRT_MoE"]
    (attribute,) = node.attribute
    node.attribute[0].CopyFrom(onnx.helper.make_attribute(attribute.name, "silu"))
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(proto.SerializeToString())
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    (layer,) = [layer for layer in layers if layer.type == trt.LayerType.MOE]
    layer.__class__ = trt.IMoELayer
    assert layer.activation_type == trt.MoEActType.NONE


def test_onnxruntime_computes_what_it_means():
    module = SwiGLU()
    graph = exported(module, target="tensorrt-sm100")
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())
    for tokens in (1, 3, 15, 64, 257):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)


def test_other_experts_take_the_form_for_any_gpu_and_say_why():
    graph = exported(idioms.SkipEmpty(), target="tensorrt-sm100")
    (note,) = [note for note in graph.notes if "experts at" in note]
    assert "lowered as 'blocks', not 'trt_moe': " in note
    with pytest.raises(
        NotExportableError, match=r"TRT_MoE takes experts down\(silu\(gate x\) \* up x\) without biases"
    ):
        exported(idioms.SkipEmpty(), experts="trt_moe")


def test_its_file_comes_to_an_engine_with_the_layer_in_it(tmp_path):
    graph = exported(SwiGLU(), target="tensorrt-sm100")
    path = tmp_path / "moe.onnx"
    write_model(graph.model, path)
    read, _ = read_graph(path)
    assert [node.op_type for node in read.graph].count("TRT_MoE") == 1
    assert {function.opset_imports[""] for function in read.functions.values()} == {17}
    findings = find_refusals(read)
    assert not findings.refused
    (doubt,) = findings.doubts
    assert "10.x and 11.x" in str(doubt)
    with pytest.raises(NotExportableError, match="builds no sm120") as refusal:
        build_engines(path, ["sm120"])
    assert "trt.TRT_MoE" in refusal.value.where
    assert "experts_idioms.py:" in refusal.value.where
    assert "--target tensorrt " in refusal.value.hint
