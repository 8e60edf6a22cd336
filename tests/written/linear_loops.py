"""Linear recurrences with one decay for many entries of the state, as models write them. Tiny, so that runs are quick.

Letters: b batch, l length, h heads, n axis that is read over, p the other one.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.tracing.dims import DimRequest

B, L, H, N, P = 2, 10, 3, 4, 5


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Mamba2(nn.Module):
    """h' = exp(dt A) h + dt x B; y = h C + D x. A is a head's, B and C are shared by the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.tensor([1.0, 4.0, 16.0]))
        self.D = nn.Parameter(torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], H, P, N)
        ys = []
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t] * self.A)[..., None, None]
            h = h * decay + torch.einsum("bn,bh,bhp->bhpn", b[:, t], dt[:, t], x[:, t])
            ys.append(torch.einsum("bhpn,bn->bhp", h, c[:, t]) + self.D[:, None] * x[:, t])
        return torch.stack(ys, dim=1)


class Mamba2Outside(Mamba2):
    """The same, discretised for all steps before the loop, the last state handed out."""

    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        decay = torch.exp(dt * self.A)  # (b, l, h)
        added = (dt[..., None] * x)[..., None] * b[:, :, None, None, :]  # (b, l, h, p, n)
        h = x.new_zeros(x.shape[0], H, P, N)
        y = torch.zeros_like(x)
        for t in range(x.shape[1]):
            h = decay[:, t, :, None, None] * h + added[:, t]
            y[:, t] = (h * c[:, t, None, None, :]).sum(-1)
        return y, h


class LinearAttention(nn.Module):
    """S += k v; y = q S / (q z), with the sum of the keys as a second state. No decay."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        s = q.new_zeros(q.shape[0], H, N, P)
        z = q.new_zeros(q.shape[0], H, N)
        ys = []
        for t in range(q.shape[1]):
            s = s + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            z = z + k[:, t]
            top = torch.einsum("bhn,bhnp->bhp", q[:, t], s)
            ys.append(top / (q[:, t] * z).sum(-1, keepdim=True))
        return torch.stack(ys, dim=1)


class Retention(nn.Module):
    """A constant decay a head (arXiv:2307.08621), read before the step's own value is added; from a given state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gamma", torch.tensor([0.9, 0.5, 0.99]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        ys = []
        for t in range(q.shape[1]):
            ys.append((q[:, t, :, None, :] @ s).squeeze(-2))
            s = self.gamma[:, None, None] * s + k[:, t, :, :, None] @ v[:, t, :, None, :]
        return torch.stack(ys, dim=1), s


class Backwards(nn.Module):
    """From the last step to the first, with a gate between 0 and 1 a sequence."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        s = q.new_zeros(q.shape[0], H, N, P)
        gate = torch.sigmoid(f)
        ys: list[Tensor] = []
        for t in range(q.shape[1] - 1, -1, -1):
            s = gate[:, t, None, None, None] * s + k[:, t, :, :, None] * v[:, t, :, None, :]
            ys.insert(0, torch.einsum("bhnp,bhn->bhp", s, q[:, t]))
        return torch.stack(ys, dim=1)


class TimeFirst(nn.Module):
    """Time in front, and sums over two axes of the state."""

    def forward(self, x: Tensor, dt: Tensor, b: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], P, H, N)
        ys = []
        for t in range(x.shape[0]):
            h = torch.exp(-dt[t])[:, None, None, None] * h + x[t][:, :, None, None] * b[t][:, None]
            ys.append((h * b[t][:, None]).sum((-1, -2)))
        return torch.stack(ys)


class PerEntry(nn.Module):
    """A decay for each entry: no chunked form."""

    def __init__(self, channels: int = P) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, a: Tensor, c: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.channels, N)
        ys = []
        for t in range(x.shape[1]):
            h = torch.exp(-a[:, t]) * h + x[:, t, :, None]
            ys.append((h * c[:, t, None]).sum(-1))
        return torch.stack(ys, dim=1)


class Signed(nn.Module):
    """A factor that may be negative has no logarithm."""

    def forward(self, q: Tensor, f: Tensor) -> Tensor:
        h = q.new_zeros(q.shape[0], H, N)
        ys = []
        for t in range(q.shape[1]):
            h = torch.tanh(f[:, t])[:, None, None] * h + q[:, t]
            ys.append((h * q[:, t]).sum(-1))
        return torch.stack(ys, dim=1)


class Squashed(nn.Module):
    """No linear recurrence."""

    def forward(self, q: Tensor) -> Tensor:
        h = q.new_zeros(q.shape[0], H, N)
        ys = []
        for t in range(q.shape[1]):
            h = torch.tanh(h + q[:, t])
            ys.append((h * q[:, t]).sum(-1))
        return torch.stack(ys, dim=1)


def positive(*shape: int) -> Tensor:
    return F.softplus(randn(*shape))


q, k, v = randn(B, L, H, N), randn(B, L, H, N) * 0.7, randn(B, L, H, P)
mamba2 = (v, positive(B, L, H), randn(B, L, N), randn(B, L, N) * 0.5)
LOOPS: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "mamba2": (Mamba2(), mamba2),
    "mamba2_outside": (Mamba2Outside(), mamba2),
    "linear_attention": (LinearAttention(), (q, k, v)),
    "retention": (Retention(), (q, k, v, randn(B, H, N, P))),
    "backwards": (Backwards(), (q, k, v, randn(B, L))),
    "time_first": (TimeFirst(), (randn(L, B, P), positive(L, B), randn(L, B, H, N))),
}
REFUSED: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    "per_entry": (
        PerEntry(), (randn(B, L, P), positive(B, L, P, N), randn(B, L, N)), "decay differs along the axes",
    ),
    "signed": (Signed(), (q, randn(B, L)), "not known to be positive"),
    "squashed": (Squashed(), (q,), "Tanh of a state is not linear"),
}  # fmt: skip


def exported(
    module: nn.Module, inputs: tuple[Tensor, ...], time: int = 1, **options: Any
) -> tuple[Subject, Graph]:
    """A loop as a model, and its graph with batch and length free; what else is asked of it, as `Options`."""
    subject = make_subject(module, inputs, {}, source=Path(inspect.getfile(type(module))), how="a test")
    free = {(key, 1 - time): "batch" for key in subject.inputs}
    free |= {(key, time): "sequence" for key, tensor in subject.inputs.items() if tensor.shape[time] == L}
    dims = DimRequest(static=True, picked=free)
    return subject, export_subject(subject, Options(dims=dims, gates=False, simplify=False, **options))[0]


def run(graph: Graph, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    """What a graph gives for those of the inputs that it takes, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString(), options)
    taken = {value.name for value in session.get_inputs()}
    return session.run(None, {key: value.numpy() for key, value in inputs.items() if key in taken})


def example(subject: Subject, length: int, batch: int, time: int = 1) -> dict[str, Tensor]:
    """Other values, at another length and batch; what has no time keeps its size there."""
    generator = torch.Generator().manual_seed(length)
    result = {}
    for name, tensor in subject.inputs.items():
        shape = list(tensor.shape)
        shape[1 - time] = batch
        if tensor.shape[time] == L:
            shape[time] = length
        value = torch.randn(shape, generator=generator)
        result[name] = {"dt": F.softplus, "beta": torch.sigmoid}.get(name, torch.clone)(value)
    return result
