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


def test_canary_what_an_opaque_node_says_is_read_as_it_is_written():
    with canary(
        "export/torch_compat/opaque.py",
        "torch.onnx.ops.symbolic is traced as a node with its domain, its name and its encoded attributes",
        todo="read what torch/onnx/ops/_symbolic_impl.py writes now",
    ):
        from moe_export.export.torch_compat.opaque import opaque_attributes, opaque_operator

        class Marked(nn.Module):
            def forward(self, x):
                said = {"loop": 3, "axes": [1, 0], "backwards": [0, 1]}
                (y,) = torch.onnx.ops.symbolic_multi_out(
                    "moe_export.loop::End", (x,), said, dtypes=[x.dtype], shapes=[x.shape], version=1
                )
                return torch.onnx.ops.symbolic(
                    "moe_export.loop::State", (y,), {"place": 2}, dtype=x.dtype, shape=x.shape, version=1
                )

        program = torch.export.export(Marked(), (torch.ones(3, 2),), strict=False).run_decompositions({})
        said = [(opaque_operator(n), opaque_attributes(n)) for n in program.graph.nodes if opaque_operator(n)]
        assert said == [
            (("moe_export.loop", "End"), {"loop": 3, "axes": [1, 0], "backwards": [0, 1]}),
            (("moe_export.loop", "State"), {"place": 2}),
        ]
        assert all(
            opaque_operator(node) is None for node in program.graph.nodes if node.op != "call_function"
        )
