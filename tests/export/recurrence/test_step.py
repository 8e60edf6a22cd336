"""The graph of one step: N steps of it, states handed on, are one run of the model on N."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import slow
from torch import Tensor, nn

from moe_export.errors import NotExportableError
from moe_export.export.frontend.load import load_subject
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.tracing.lengths import Length

MODELS = Path(__file__).parents[3] / "models"
SEQ = 1


class TokenShift(nn.Module):
    """The step before as RWKV mixes it in, a causal convolution, and two loops, the second over the first's results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, groups=4, padding=2)
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = nn.functional.pad(x, (0, 0, 1, -1))
        x = 0.3 * x + 0.7 * before
        x = self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        h = x.new_zeros(x.shape[0], 4)
        ys = []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            ys.append(h)
        g = torch.zeros_like(h)
        zs = []
        for y in ys:
            g = 0.9 * g + y
            zs.append(g)
        return torch.stack(zs, dim=1), h


class Counting(nn.Module):
    """A mean, and a power, of the number of the step."""

    def forward(self, x: Tensor) -> Tensor:
        h = g = torch.zeros_like(x[:, 0])
        ys = []
        for t in range(x.shape[1]):
            h = h + (x[:, t] - h) / (t + 1)
            g = g * 0.9**t + h
            ys.append(g)
        return torch.stack(ys, dim=1)


class LooksAhead(nn.Module):
    """Centred on each step: no step can be computed before the next one is there."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + x.flip(1)
        h = torch.zeros_like(x[:, 0])
        ys = []
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t])
            ys.append(h)
        return torch.stack(ys, dim=1)


class Backwards(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        ys: list[Tensor] = []
        for t in reversed(range(x.shape[1])):
            h = torch.tanh(h + x[:, t])
            ys.insert(0, h)
        return torch.stack(ys, dim=1)


def made(module: nn.Module, batch: int = 2) -> Subject:
    torch.manual_seed(0)
    return make_subject(module, (torch.randn(batch, 10, 4),), {}, source=Path(__file__), how="a test")


def session(graph: Graph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    proto = ir.to_proto(graph.model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def exported(subject: Subject) -> Graph:
    graph = export_subject(subject, Options(gates=False, simplify=False, decode=True))[-1]
    assert graph.kind == "step"
    return graph


@pytest.mark.parametrize("name", [slow("mamba"), "token_shift", slow("one_sequence"), "counting"])
@pytest.mark.slow_but_one
def test_steps_one_by_one_are_the_whole(name: str) -> None:
    """`one_sequence` is `TokenShift` with an example of batch 1."""
    sequences = 1 if name == "one_sequence" else 2
    module = Counting() if name == "counting" else TokenShift()
    subject = load_subject(str(MODELS / "mamba.py")) if name == "mamba" else made(module, sequences)
    step = exported(subject)
    runtime = session(step)
    names = [value.name for value in runtime.get_inputs()]
    results = [value.name for value in runtime.get_outputs()]
    pasts = [one for one in names if one.startswith("past_")]
    assert [one.replace("past_", "present_") for one in pasts] == results[-len(pasts) :]
    assert not any(node.op_type in ("Scan", "Loop") for node in step.model.graph.all_nodes())
    (sequence,) = [one for one in names if one not in pasts]
    for batch, length in ((1, 5), (3, 20)):
        example = Length(((sequence, SEQ),)).resized(subject.inputs, length)
        example = Length(((sequence, 0),)).resized(example, batch)
        states = {
            value.name: np.zeros(
                [batch if isinstance(size, str) else size for size in value.shape],
                np.int64 if value.type == "tensor(int64)" else np.float32,
            )
            for value in runtime.get_inputs()
            if value.name in pasts
        }
        with torch.no_grad():
            wanted = dict(zip(subject.outputs, subject.call_named(example), strict=True))
        rows = []
        for t in range(length):
            found = runtime.run(None, {sequence: example[sequence][:, t : t + 1].numpy(), **states})
            row = dict(zip(results, found, strict=True))
            states = {one: row[one.replace("past_", "present_")] for one in pasts}
            rows.append(row)
        for key, whole in wanted.items():
            steps = [row[key] for row in rows]
            result = np.concatenate(steps, SEQ) if whole.dim() == 3 else steps[-1]
            np.testing.assert_allclose(result, whole.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (LooksAhead(), "steps one by one give something else than all at once"),
        (Backwards(), "runs backwards"),
        (nn.Linear(4, 4), "no loop over a length"),
    ],
)
def test_what_has_no_step_says_why(module: nn.Module, reason: str) -> None:
    with pytest.raises(NotExportableError, match=reason):
        exported(made(module))
