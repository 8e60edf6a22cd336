"""Graphs of ranks hold their own experts packed, each as in the whole graph."""

from __future__ import annotations

import onnx_ir as ir

from moe_export.export import Options
from moe_export.export.parallel.ranks import Parallel, rank_graphs
from moe_export.export.pipeline import Graph
from moe_export.export.stages import between, run


def test_each_rank_has_its_experts_packed(program):
    options = Options(opset=21, weights_dtype="int4", simplify=False, gates=False)
    whole = Graph.of(run(between("einsums", "engine"), program, options), "model", "model", options)
    ranks = rank_graphs(whole, options, Parallel(2))
    packed = {
        name: tensor.const_value.tobytes()
        for staged in ranks.staged
        for stage in staged.stages
        for name, tensor in stage.graph.initializers.items()
        if tensor.dtype is ir.DataType.INT4
    }
    assert len(packed) == 12  # 3 weights of 4 experts, each on one rank
    own = {name: value.const_value.tobytes() for name, value in whole.model.graph.initializers.items()}
    assert {name: own[name] for name in packed} == packed
