"""What the exporter tells of nodes is read as it means it."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from canaries import canary
from torch import nn

from moe_export.export.torch_compat import metadata
from moe_export.export.tracing.trace import quiet

FILE = "export/torch_compat/metadata.py"


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).sigmoid()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def forward(self, x):
        capacity = torch.sym_int(x.shape[0] * 1.05)
        heads = x[None, None]
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads)[0, 0]
        return self.gate(x)[:capacity], attended


@pytest.fixture(scope="module")
def nodes():
    free = ({0: torch.export.Dim.DYNAMIC},)
    block = Block().eval()
    with torch.no_grad(), quiet():
        program = torch.export.export(block, (torch.ones(8, 4),), dynamic_shapes=free, strict=False)
        found = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False, optimize=False)
    return list(found.model.graph)


def test_canary_a_node_tells_its_modules_and_its_lines(nodes):
    with canary(
        FILE,
        "pkg.torch.onnx.name_scopes, class_hierarchy and stack_trace are lists and lines in Python's notation",
        todo="see _set_node_metadata in torch/onnx/_internal/exporter/_core.py for the keys and their form",
    ):
        sigmoid = next(node for node in nodes if node.op_type == "Sigmoid")
        assert metadata.scopes_of(sigmoid) == ["", "gate"]
        assert metadata.module_of(sigmoid) == "gate"
        assert metadata.classes_of(sigmoid)[-1] == "aten.sigmoid.default"
        assert "in forward" in metadata.stack_trace_of(sigmoid)
        assert metadata.traced_as(sigmoid) == "sigmoid"
        assert sigmoid.name == "node_sigmoid"
        linear = next(
            node
            for node in nodes
            if node.op_type in ("Gemm", "MatMul") and "gate" in (metadata.scopes_of(node) or ())
        )
        assert metadata.module_of(linear) == "gate.linear"


def test_canary_a_node_tells_what_it_was_translated_from(nodes):
    with canary(
        FILE,
        "pkg.torch.onnx.fx_node is the node's own text, with Python's constants in full",
        todo="see format_node in torch/fx/node.py; without it, export/onnx/size_numbers.py cannot be exact",
    ):
        computing = [node for node in nodes if metadata.computes_number(node)]
        assert "Mul" in {node.op_type for node in computing}
        assert any(1.05 in metadata.numbers_in(node) for node in computing)
        attention = [
            node for node in nodes if metadata.is_translation_of(node, "scaled_dot_product_attention")
        ]
        assert "Softmax" in {node.op_type for node in attention}
        assert len({metadata.traced_as(node) for node in attention}) == 1


def test_canary_a_node_of_no_module_has_no_path_of_one():
    class Scaled(nn.Module):
        def forward(self, x):
            return x / x.shape[0]

    with canary(
        FILE,
        "torch._export.passes._node_metadata_hook writes a stack of modules that begins with `_empty_nn_module`",
        todo="see what that file writes for nodes outside of modules now",
    ):
        from torch._export.passes import _node_metadata_hook as hook

        assert not metadata.is_module_path(hook._EMPTY_NN_MODULE_STACK_KEY)
    assert not metadata.is_module_path("")
    assert metadata.is_module_path("layers.0")


def test_all_of_it_is_taken_away(nodes):
    node = ir.Node("", "Neg", [None], metadata_props={**nodes[0].metadata_props, "module": "kept"})
    metadata.forget(node)
    assert node.metadata_props == {"module": "kept"}
    assert metadata.scopes_of(node) is None
    assert metadata.module_of(node) == ""
    assert metadata.classes_of(node) == []
    assert not metadata.computes_number(node)
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "no list ["
    assert metadata.scopes_of(node) == []
