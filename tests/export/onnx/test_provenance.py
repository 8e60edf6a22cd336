"""Every node says which module, which line and which PyTorch operator it comes from."""

from __future__ import annotations

import operator

import torch
from torch import nn

from moe_export.export.onnx.provenance import operator_name, strip_scope


class Inner(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * 3


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.exp()


def test_module_source_and_operator(tools):
    model = tools.graph(Outer(), torch.randn(2, 3)).model
    inner, outer = (cls.forward.__code__.co_firstlineno for cls in (Inner, Outer))
    found = [
        (
            node.op_type,
            node.metadata_props.get("module"),
            node.metadata_props.get("source"),
            node.metadata_props["torch"],
        )
        for node in model.graph
    ]
    assert found == [
        ("Tanh", "blocks.0", f"onnx/test_provenance.py:{inner + 1}", "aten.tanh.default"),
        ("Mul", "blocks.0", f"onnx/test_provenance.py:{inner + 1}", "aten.mul.Tensor"),
        ("Tanh", "blocks.1", f"onnx/test_provenance.py:{inner + 1}", "aten.tanh.default"),
        ("Mul", "blocks.1", f"onnx/test_provenance.py:{inner + 1}", "aten.mul.Tensor"),
        ("Exp", "model", f"onnx/test_provenance.py:{outer + 3}", "aten.exp.default"),
    ]


def test_nothing_else_is_told(tools, tmp_path):
    """No absolute path, no stack trace: a graph is given to others."""
    graph = tools.graph(Outer(), torch.randn(2, 3)).model
    texts = [text for node in graph.graph for text in node.metadata_props.values()]
    texts += [text for value in graph.graph.inputs for text in value.metadata_props.values()]
    assert not [text for text in texts if text.startswith("/") or "File" in text]


def test_strip_scope():
    assert strip_scope("model.layers.0", "model") == "layers.0"
    assert strip_scope("model", "model") == "model"


def test_an_operator_that_is_a_python_function_has_a_name_and_no_address():
    assert operator_name(torch.sym_max) == "sym_max"
    assert operator_name(operator.mul) == "mul"
    assert operator_name(torch.ops.aten.add.Tensor) == "aten.add.Tensor"
    assert operator_name("<function sym_max at 0x7f52c863dd00>") == "sym_max"
