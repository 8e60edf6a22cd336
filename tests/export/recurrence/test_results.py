"""What only sums up a loop's results is done in its steps; what others read, or what mixes steps, stays outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import only, slow
from torch import Tensor, nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Graph, Options, export_subject

D, N, L = 12, 3, 5


class Loop(nn.Module):
    """All h of h(t) = decay h(t - 1) + x B, (b, l, d, n), and what is made of them behind the loop."""

    def __init__(self, behind: Callable[..., Tensor], backwards: bool = False) -> None:
        super().__init__()
        self.weight, self.behind, self.backwards = nn.Parameter(torch.rand(D, N)), behind, backwards

    def forward(self, x: Tensor, C: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], D, N)
        steps = range(x.shape[1])
        found = []
        for t in reversed(steps) if self.backwards else steps:
            h = torch.sigmoid(x[:, t, :, None]) * h + x[:, t, :, None] * self.weight
            found.append(h)
        if self.backwards:
            found.reverse()
        return self.behind(self, torch.stack(found, 1), x, C)


INWARDS = {
    "product": lambda m, hs, x, C: (hs @ C[..., None]).squeeze(-1),
    "einsum": lambda m, hs, x, C: torch.einsum("bldn,bln->bld", hs, C),
    "sum": lambda m, hs, x, C: (hs * m.weight).sum(-1) + x,
    "sum of the long axis": lambda m, hs, x, C: (hs * x[..., None]).sum(2),
    "mean, kept": lambda m, hs, x, C: hs.mean(-1, keepdim=True) * x[..., None],
    "one for all steps": lambda m, hs, x, C: (hs * C[:, :1, None]).sum(-1),
}
STAY = {
    "over time": lambda m, hs, x, C: hs.sum(1),
    "read twice": lambda m, hs, x, C: hs.sum(-1)[..., None] + hs,
    "a step back": lambda m, hs, x, C: (hs[:, 1:] * hs[:, :-1]).sum(-1),
    "as it is": lambda m, hs, x, C: hs + 1,
}


def exported(behind: Callable[..., Tensor], backwards: bool = False) -> tuple[Loop, Graph]:
    torch.manual_seed(0)
    module = Loop(behind, backwards).eval()
    inputs = (torch.randn(2, L, D), torch.randn(2, L, N))
    subject = make_subject(module, inputs, {}, source=Path(__file__), how="a test")
    return module, export_subject(subject, Options(gates=False, recurrence="scan"))[0]


def handed_out(graph: Graph) -> list[list[int]]:
    (found,) = [node for node in graph.model.graph if node.op_type == "Scan"]
    return [list(value.shape)[1:] for value in list(found.attributes["body"].as_graph().outputs)[1:]]


def check(module: Loop, graph: Graph, lengths: tuple[int, ...] = (1, 2, 7, 64)) -> None:
    proto = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    for length in lengths:
        for batch in (1, 3):
            x, C = torch.randn(batch, length, D), torch.randn(batch, length, N)
            with torch.no_grad():
                wanted = module(x, C).numpy()
            feed = {"x": x.numpy(), "C": C.numpy()}
            found = session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})[0]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def check_inwards(name: str, backwards: bool) -> None:
    module, graph = exported(INWARDS[name], backwards)
    (shape,) = handed_out(graph)
    assert np.prod(shape) in (D, N)
    check(module, graph)


@pytest.mark.parametrize("name", ["product", slow("one for all steps")])
def test_what_sums_up_is_done_in_the_step(name: str) -> None:
    check_inwards(name, False)


@pytest.mark.slow
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", list(INWARDS))
def test_every_way_forwards_and_backwards(name: str, backwards: bool) -> None:
    check_inwards(name, backwards)


@pytest.mark.parametrize("name", only(["over time", "read twice"], STAY))
def test_what_others_read_or_mixes_steps_stays(name: str) -> None:
    module, graph = exported(STAY[name])
    assert handed_out(graph) == [[D, N]]
    check(module, graph, (2, 7, 64) if name == "a step back" else (1, 2, 7, 64))
