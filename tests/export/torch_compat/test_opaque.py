"""A node that is written into a traced graph comes out in ONNX as it is."""

from __future__ import annotations

import torch
from canaries import canary
from torch import nn


class Shifted(nn.Module):
    def forward(self, x):
        return x + 1


def test_canary_an_opaque_node_is_carried_into_onnx():
    with canary(
        "export/torch_compat/opaque.py",
        "the exporter translates torch.ops.onnx_symbolic._symbolic to the node that its arguments describe",
        todo="write what torch.onnx.ops.symbolic (torch/onnx/ops/__init__.py) now calls when it is traced",
    ):
        from moe_export.export.torch_compat.metadata import classes_of, is_opaque
        from moe_export.export.torch_compat.opaque import opaque_node

        free = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(Shifted(), (torch.ones(3, 2),), dynamic_shapes=free, strict=False)
        graph = program.graph_module.graph
        x, result, _ = graph.nodes
        with graph.inserting_before(result):
            rows = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
            rows.meta["val"] = x.meta["val"].shape[0]
            node = opaque_node(graph, ("moe_export", "Experts"), [x], {"block": 7}, torch.float32, [rows, 2])
            node.meta = dict(result.meta)
        result.args = (node, 1)
        model = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False).model
        (found,) = (each for each in model.graph if each.op_type == "Experts")
        assert found.domain == "moe_export"
        assert found.attributes["block"].as_int() == 7
        assert found.inputs[0] is model.graph.inputs[0]
        assert found.outputs[0].dtype.name == "FLOAT"
        assert is_opaque(classes_of(found)[-1].split(".")[1])
