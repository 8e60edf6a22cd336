"""ONNX Runtime on a CPU: the lowerings of an MoE block against the loop as it was written, all in one run.

    E   k      N   as written   slices   loop     MFLOP   MB of weights that were hit

MFLOP and MB are the least that the routing asks for: three matrix products a token-expert pair, and each expert
that was hit read once. H = 256, I = 512, SwiGLU; times are medians of interleaved runs, in ms.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_export.export.experts_choose import choose
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.subject import make_subject

H, I = 256, 512  # noqa: E741  the letters of the papers
SIZES = (1, 16, 128, 1024)
ROUNDS = 9
NOISE = 1.35
"""Other work on the machine: how much slower the chosen lowering may look than the loop as it was written."""


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, I, bias=False)
        self.up = nn.Linear(H, I, bias=False)
        self.down = nn.Linear(I, H, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, experts: int, k: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, experts, bias=False)
        self.experts = nn.ModuleList([SwiGLU() for _ in range(experts)])
        self.k = k

    def forward(self, x):
        weights, indices = torch.topk(self.router(x).softmax(-1), self.k, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(indices == number)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def sessions(experts: int, k: int) -> dict[str, onnxruntime.InferenceSession]:
    subject = make_subject(Block(experts, k), (torch.randn(32, H),), {}, source=Path(__file__), how="bench")
    found = {}
    for name, lowering in (("as written", "keep"), ("slices", "slices"), ("loop", "loop")):
        model = export_subject(subject, Options(gates=False, simplify=False, experts=lowering))[0].model
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        found[name] = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    return found


def medians(found: dict[str, onnxruntime.InferenceSession], x: np.ndarray) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(ROUNDS):
        for name, session in found.items():
            start = time.perf_counter()
            session.run(None, {"x": x})
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (64, 8)])
def test_the_chosen_lowering_is_as_fast_as_the_loop_that_was_written(experts, k):
    found = sessions(experts, k)
    print("\n  E  k     N   as written   slices     loop    MFLOP     MB")
    for count in SIZES:
        x = np.random.default_rng(0).standard_normal((count, H)).astype(np.float32)
        results = {name: session.run(None, {"x": x})[0] for name, session in found.items()}
        for name in ("slices", "loop"):
            np.testing.assert_allclose(results[name], results["as written"], rtol=1e-5, atol=1e-5)
        row = medians(found, x)
        pairs = count * k
        hit = experts * (1 - (1 - 1 / experts) ** pairs)
        print(
            f"{experts:3d} {k:2d} {count:5d} {row['as written']:12.2f} {row['slices']:8.2f} {row['loop']:8.2f}"
            f" {2e-6 * pairs * 3 * H * I:8.1f} {hit * 3 * H * I * 4 / 2**20:6.1f}"
        )
        assert row[choose("auto", experts)] < NOISE * row["as written"]
