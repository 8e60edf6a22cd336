"""What a model fills step by step may lie in memory in another order than its axes, and be read by `view`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Options, export_subject


class Heads(nn.Module):
    """DeltaNet's recurrence: the results are laid out like v, time before heads, though the heads' axis is first."""

    def forward(self, x: Tensor) -> Tensor:
        b, length, d = x.shape
        k, v = (part.view(b, length, 2, -1).transpose(1, 2) for part in (torch.tanh(x), x * 2))
        state = x.new_zeros(b, 2, d // 2, d // 2)
        y = torch.zeros_like(v)
        for t in range(length):
            error = v[:, :, t] - (state * k[:, :, t, :, None]).sum(-2)
            state = state + k[:, :, t, :, None] * error[:, :, None]
            y[:, :, t] = (state * v[:, :, t, :, None]).sum(-2)
        return y.transpose(1, 2).view(b, length, d)


@pytest.mark.slow
def test_a_view_of_what_a_loop_made_needs_none_of_the_strides_that_the_model_had() -> None:
    model = Heads().eval()
    subject = make_subject(model, (torch.randn(2, 6, 4),), {}, source=Path(__file__), how="a test")
    (graph,) = export_subject(subject, Options(gates=False, simplify=False, recurrence="scan"))
    proto = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    for length in (1, 2, 19):
        x = torch.randn(3, length, 4) / 2
        found = session.run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-4, atol=1e-5)
