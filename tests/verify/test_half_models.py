"""A model in half precision whose router scores in float32: choices that fall another way are flips, wrong ones found.

ONNX Runtime's CPU has few kernels for bfloat16, and fuses some of float16: operators run in float32 and are rounded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_export.comparing.checking import verify_graph
from moe_export.export import Options, export_subject
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.verify import Tolerance
from moe_export.verify.inputs.regimes import NORMAL

WIDTH, EXPERTS, TOKENS = 32, 8, 3000


class Layer(nn.Module):
    """Two experts for each token, chosen by scores in float32."""

    def __init__(self):
        super().__init__()
        self.norm, self.router = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x):
        rows = self.norm(x)
        weights, chosen = self.router(rows).float().softmax(-1).topk(2, -1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, F.silu(expert(rows[token])) * weights[token, slot, None].to(x.dtype))
        return x + out


def exported(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(3))).to(dtype).eval()
    example = torch.randn(TOKENS, WIDTH, dtype=dtype)
    subject = make_subject(model, (example,), {}, source=Path(__file__), how="a test")
    (graph,) = export_subject(subject, Options(gates=False, experts="slices"))
    return graph


def verdict(graph, path):
    write_model(graph.model, path)
    return verify_graph(graph, path, tolerance=Tolerance())[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tokens_that_nearly_tie_may_go_to_either(tmp_path, dtype):
    report = verdict(exported(dtype), tmp_path / "model.onnx")
    assert report.verdict == "equal", report
    assert report.candidate == f"onnxruntime-cpu, rounding to {str(dtype).removeprefix('torch.')}"
    ordinary = [case for case in report.cases if case.regime == NORMAL]
    flips = sum(row.flips for case in ordinary for row in case.judgements)
    assert 0 < flips < TOKENS * len(ordinary) / 100


@pytest.mark.parametrize("share", [0.003, 0.1])
def test_a_router_that_is_slightly_wrong_is_found(tmp_path, share):
    """One weight of a router is off, by a few of its last digits or by more."""
    graph = exported(torch.float16)
    router = next(
        value
        for value in graph.model.graph.initializers.values()
        if sorted(value.shape.numpy()) == [EXPERTS, WIDTH] and value.dtype is ir.DataType.FLOAT16
    )
    array = router.const_value.numpy().copy()
    array.flat[int(np.argmax(np.abs(array)))] *= 1 + share
    router.const_value = ir.Tensor(array, dtype=router.dtype, name=router.name)
    report = verdict(graph, tmp_path / "model.onnx")
    assert report.verdict == "not equal"
