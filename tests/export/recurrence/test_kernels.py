"""Model files that call GPU kernels of packages that are not installed: exported, and right by their definition."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import slow

from moe_export.errors import NotExportableError
from moe_export.export.frontend.kernel_shims import install_kernel_shims
from moe_export.export.frontend.kernels import convolutions, scans
from moe_export.export.frontend.load import load_subject
from moe_export.export.frontend.subject import Subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.lengths import Length

MAMBA = """
import torch, torch.nn as nn
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

class Mixer(nn.Module):
    def __init__(self, d=6, n=4, w=3):
        super().__init__()
        torch.manual_seed(0)
        self.n = n
        self.conv, self.conv_bias = nn.Parameter(torch.randn(d, w)), nn.Parameter(torch.randn(d))
        self.proj = nn.Linear(d, d + 2 * n)
        self.A_log, self.D = nn.Parameter(torch.randn(d, n) * 0.3), nn.Parameter(torch.randn(d))

    def forward(self, x, z):  # (b, d, l)
        x = causal_conv1d_fn(x, self.conv, self.conv_bias, activation="silu")
        dt, B, C = self.proj(x.transpose(1, 2)).transpose(1, 2).split([x.shape[1], self.n, self.n], dim=1)
        return selective_scan_fn(
            x, dt, -self.A_log.exp(), B, C, self.D, z=z, delta_bias=self.D, delta_softplus=True
        )

model = Mixer()
example_inputs = (torch.randn(2, 6, 10), torch.randn(2, 6, 10))
"""

MAMBA2 = """
import torch, torch.nn as nn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm

class Mixer(nn.Module):
    def __init__(self, h=4, p=16, n=8, g=2):
        super().__init__()
        torch.manual_seed(0)
        self.sizes = [h * p, g * n, g * n, h]
        self.h, self.g, self.p = h, g, p
        self.proj = nn.Linear(12, sum(self.sizes))
        self.A_log, self.D, self.bias = (nn.Parameter(torch.randn(h)) for _ in range(3))
        self.norm = RMSNorm(h * p, group_size=p, norm_before_gate=False)

    def forward(self, u):  # (b, l, 12)
        x, B, C, dt = self.proj(u).split(self.sizes, dim=-1)
        heads = x.unflatten(-1, (self.h, self.p))
        y, last = mamba_chunk_scan_combined(
            heads, dt, -self.A_log.exp(), B.unflatten(-1, (self.g, -1)), C.unflatten(-1, (self.g, -1)), 64,
            D=self.D, dt_bias=self.bias, dt_softplus=True, return_final_states=True,
        )
        return self.norm(y.flatten(2), x), last

model = Mixer()
example_inputs = (torch.randn(2, 10, 12),)
"""


def loaded(folder: Path, source: str) -> Subject:
    path = folder / "mixer.py"
    path.write_text(source, encoding="utf-8")
    return load_subject(str(path))


def exported(subject: Subject, time: int) -> Graph:
    batch = {(name, 0): "batch" for name in subject.inputs}
    picked = batch | {(name, time): "sequence" for name in subject.inputs}
    return export_subject(
        subject, Options(dims=DimRequest(static=True, picked=picked), gates=False, simplify=False)
    )[0]


@pytest.mark.parametrize(("source", "time", "form"), [(MAMBA, 2, "Scan"), slow((MAMBA2, 1, "over chunks"))])
def test_a_file_that_calls_them_is_exported_for_any_length(
    tmp_path: Path, source: str, time: int, form: str
) -> None:
    subject = loaded(tmp_path, source)
    graph = exported(subject, time)
    assert any(form in note for note in graph.notes)
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for length, batch in ((1, 1), (2, 3), (7, 1), (33, 3), (64, 1)):
        inputs = Length(tuple((name, time) for name in subject.inputs)).resized(subject.inputs, length)
        inputs = Length(tuple((name, 0) for name in subject.inputs)).resized(inputs, batch)
        with torch.no_grad():
            wanted = subject.call_named(inputs)
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=1e-5, err_msg=f"{length}, {batch}")


def test_a_library_that_asks_whether_the_package_is_there_hears_the_truth() -> None:
    install_kernel_shims()
    code = compile("import importlib.util as u; found = u.find_spec(name)", importlib.util.__file__, "exec")
    for name in ("causal_conv1d", "mamba_ssm"):
        if name not in sys.modules:
            scope = {"name": name}
            exec(code, scope)
            assert scope["found"] is None


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_selective_scan_is_the_sum_that_it_is_defined_by() -> None:
    """y(t) = sum over s <= t of C(t) exp(A (delta(s+1) + … + delta(t))) delta(s) B(s) u(s), written out."""
    b, g, r, n, length = 2, 2, 3, 4, 6
    d = g * r
    u, delta, z = draw(b, d, length), draw(b, d, length).abs() + 0.1, draw(b, d, length)
    a, skip = -draw(d, n).abs(), draw(d)
    B, C = draw(b, g, n, length), draw(b, g, n, length) * 0.5
    wanted = np.zeros((b, d, length))
    for i in range(b):
        for c in range(d):
            for t in range(length):
                for s in range(t + 1):
                    decay = torch.exp(a[c] * delta[i, c, s + 1 : t + 1].sum())
                    wanted[i, c, t] += (
                        C[i, c // r, :, t] * decay * delta[i, c, s] * B[i, c // r, :, s] * u[i, c, s]
                    ).sum()
                wanted[i, c, t] += skip[c] * u[i, c, t]
                wanted[i, c, t] *= z[i, c, t] * torch.sigmoid(z[i, c, t])
    parts = [v.float() for v in (u, delta, a, B, C, skip, z)]
    y, last = scans.selective_scan_fn(*parts, return_last_state=True)
    np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert last.shape == (b, d, n)


def test_mamba_2_is_mamba_with_a_decay_a_head() -> None:
    b, length, h, p, n = 2, 5, 4, 3, 6
    x, dt = draw(b, length, h, p).float(), draw(b, length, h).float()
    a, skip, bias = -draw(h).float().abs(), draw(h).float(), draw(h).float()
    B, C = draw(b, length, 1, n).float(), draw(b, length, 1, n).float() * 0.5
    y, last = scans.mamba_chunk_scan_combined(
        x, dt, a, B, C, 4, D=skip, dt_bias=bias, dt_softplus=True, return_final_states=True
    )
    flat, state = scans.selective_scan_fn(
        x.flatten(2).transpose(1, 2), dt.repeat_interleave(p, 2).transpose(1, 2),
        a.repeat_interleave(p)[:, None].expand(-1, n), B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1),
        skip.repeat_interleave(p), delta_bias=bias.repeat_interleave(p), delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    torch.testing.assert_close(y.flatten(2).transpose(1, 2), flat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.flatten(1, 2), state, rtol=1e-5, atol=1e-5)


def test_steps_one_by_one_are_the_whole() -> None:
    b, d, n, w, length = 2, 6, 4, 3, 5
    x, dt, B, C = (draw(b, k, length).float() for k in (d, d, n, n))
    a, weight, bias = -draw(d, n).float().abs(), draw(d, w).float(), draw(d).float()
    state, window = torch.zeros(b, d, n), torch.zeros(b, d, w - 1)
    whole, last = convolutions.causal_conv1d_fn(x, weight, bias, activation="silu", return_final_states=True)
    scanned, end = scans.selective_scan_fn(whole, dt, a, B, C, delta_softplus=True, return_last_state=True)
    for t in range(length):
        y = convolutions.causal_conv1d_update(x[..., t], window, weight, bias, activation="silu")
        torch.testing.assert_close(y, whole[..., t])
        y = scans.selective_state_update(state, y, dt[..., t], a, B[..., t], C[..., t], dt_softplus=True)
        torch.testing.assert_close(y, scanned[..., t])
    torch.testing.assert_close(window, last)
    torch.testing.assert_close(state, end)


def test_what_only_the_kernel_can_do_is_refused() -> None:
    with pytest.raises(NotExportableError, match="seq_idx"):
        convolutions.causal_conv1d_fn(draw(1, 2, 3), draw(2, 2), seq_idx=torch.zeros(1, 3))
    with pytest.raises(NotExportableError, match="complex"):
        scans.selective_scan_fn(draw(1, 2, 3), draw(1, 2, 3), draw(2, 2) * 1j, draw(2, 2), draw(2, 2))
