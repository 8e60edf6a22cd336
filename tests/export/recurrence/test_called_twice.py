"""A loop that starts from what an equal loop before it ended with: its states, its buffer, or an earlier state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import only
from torch import Tensor, nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Graph, Options, export_subject

D, L = 6, 9


def run(x: Tensor, h: Tensor, out: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each h of h(t) = tanh(0.7 h(t - 1) + x(t)), which also halves what is in the buffer and is added to it."""
    found = []
    for t in range(x.shape[1]):
        h = torch.tanh(0.7 * h + x[:, t])
        out[:, t] = 0.5 * out[:, t] + h
        found.append(h)
    return found, out


class StatesGoOn(nn.Module):
    """The second loop runs backwards over what the first gave, from its last state."""

    def forward(self, x: Tensor) -> Tensor:
        hs, _ = run(x, x.new_zeros(x.shape[0], D), torch.zeros_like(x))
        return torch.stack(run(torch.stack(hs, 1).flip(1), hs[-1], torch.zeros_like(x))[0], 1)


class BufferGoesOn(nn.Module):
    """Both write into one buffer, whose last place neither does; a third reads it, and goes on with their state."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.ones(x.shape[0], x.shape[1] + 1, D)
        hs, out = run(x, x.new_zeros(x.shape[0], D), out)
        hs, out = run(x.flip(1), hs[-1], out)
        hs, _ = run(out[:, 1:], hs[-1], torch.zeros_like(x))
        return hs[-1], out


class FromAnEarlierState(nn.Module):
    """The second starts from the state after the first step, the third from the second's last but one."""

    def forward(self, x: Tensor) -> Tensor:
        first, _ = run(x, x.new_zeros(x.shape[0], D), torch.zeros_like(x))
        second, _ = run(x.flip(1), first[0], torch.zeros_like(x))
        third, _ = run(x.flip(-1), second[-2], torch.zeros_like(x))
        return torch.stack(first, 1) + torch.stack(second, 1) + torch.stack(third, 1)


WAYS: dict[str, tuple[nn.Module, int, int]] = {  # the module, its loops, and the least length that it takes
    "states": (StatesGoOn(), 2, 1),
    "buffer": (BufferGoesOn(), 3, 1),
    "earlier state": (FromAnEarlierState(), 3, 2),
}


def exported(module: nn.Module) -> Graph:
    subject = make_subject(module, (torch.randn(2, L, D),), {}, source=Path(__file__), how="a test")
    return export_subject(subject, Options(gates=False, simplify=False, recurrence="scan"))[0]


@pytest.mark.parametrize("name", only(["buffer"], WAYS))
def test_each_call_is_a_loop_of_its_own_and_goes_on_where_the_one_before_ended(name: str) -> None:
    module, loops, least = WAYS[name]
    graph = exported(module)
    assert sum(node.op_type == "Scan" for node in graph.model.graph) == loops
    assert graph.traced.inputs["x"] == ("batch", "sequence", D)
    proto = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    for length in {least, 2, L - 1, L, L + 1, 64}:
        for batch in (1, 3):
            x = torch.randn(batch, length, D, generator=torch.Generator().manual_seed(length))
            wanted = module(x)
            found = session.run(None, {"x": x.numpy()})
            for a, b in zip(wanted if isinstance(wanted, tuple) else (wanted,), found, strict=True):
                np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=1e-5)
