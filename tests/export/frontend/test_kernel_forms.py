"""The forms of kernels against the recurrences that define them, and whole sequences against single steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_cases import slow

from moe_export.export.frontend.kernels import (
    compiled_scans,
    convolutions,
    linear_attention,
    mamba_blocks,
    scans,
)
from moe_export.export.frontend.kernels.linear_attention import FUNCTIONS, KERNELS
from moe_export.export.frontend.load import load_subject
from moe_export.export.pipeline import Options, export_subject

B, L, H, K, V = 2, 6, 3, 4, 5


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def parts() -> dict[str, torch.Tensor]:
    """What any of the kernels may ask for."""
    return {
        **{name: draw(B, L, H, K) * 0.5 for name in ("q", "k", "a", "b", "erase")},
        "v": draw(B, L, H, V),
        "g": -draw(B, L, H).abs(),
        "gk": -draw(B, L, H, K).abs(),
        "gv": -draw(B, L, H, V).abs(),
        "beta": draw(B, L, H).sigmoid(),
        "bonus": draw(H, K),
        "gamma": -draw(H).abs(),
    }


def by_definition(given: dict[str, torch.Tensor], state: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence of one batch and head at a time in float64, by matrices: S ← G S, erase, write, read."""
    x = {name: value.double().numpy() for name, value in given.items()}
    y, last = np.zeros((B, L, H, V)), np.zeros((B, H, K, V))
    for i, h in np.ndindex(B, H):
        s = state[i, h].double().numpy()
        for t in range(L):
            q, k, v = (x[name][i, t, h] for name in ("q", "k", "v"))
            before = s
            if "bonus" in x:
                y[i, t, h] = (q @ (s + np.outer(x["bonus"][h] * k, v))) / np.sqrt(K)
            s = s * np.exp(x["g"][i, t, h] if "g" in x else 0) * np.exp(x["gamma"][h] if "gamma" in x else 0)
            s = np.diag(np.exp(x["gk"][i, t, h])) @ s if "gk" in x else s
            s = s @ np.diag(np.exp(x["gv"][i, t, h])) if "gv" in x else s
            if "beta" in x:
                erase = x["erase"][i, t, h] if "erase" in x else k
                v = x["beta"][i, t, h] * (v - erase @ s)
            s = s + np.outer(k, v)
            s = s + np.outer(x["b"][i, t, h], x["a"][i, t, h] @ before) if "a" in x else s
            if "bonus" not in x:
                y[i, t, h] = (q @ s) / np.sqrt(K)
        last[i, h] = s
    return y, last


@pytest.mark.parametrize(
    "name", [name for name in KERNELS if "naive" not in name and name != "delta_rule_recurrence"]
)
def test_each_kernel_of_fla_is_its_recurrence(name: str) -> None:
    roles = {word.partition(">")[0]: word.partition(">")[2] or word for word in KERNELS[name].order.split()}
    given = {word: parts()[role] for word, role in roles.items() if role in parts()}
    wanted = {roles[word]: value for word, value in given.items()}
    if "retention" in name:
        wanted["gamma"] = torch.log(1 - 2.0 ** (-5 - torch.arange(H)))
    if "lightning" in name:
        given |= {"layer_idx": 1, "num_layers": 4}
        wanted["gamma"] = -8 / H * (1 - 1 / 4) * torch.arange(H)
    options = (
        {"normalize": False} if "linear_attn" in name else {"scale": None} if name == "chunk_rwkv7" else {}
    )
    state = draw(B, H, K, V)
    y, last = FUNCTIONS[name](**given, **options, initial_state=state, output_final_state=True)
    right, end = by_definition(wanted, state)
    np.testing.assert_allclose(y, right, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last, end, rtol=1e-4, atol=1e-5)


def test_arguments_by_position_backwards_in_half_precision_and_heads_first() -> None:
    q, k, v, gk = (parts()[name] for name in ("q", "k", "v", "gk"))
    y, state = FUNCTIONS["chunk_gla"](q, k, v, gk, 0.3)
    assert state is None
    flipped = [x.flip(1) for x in (q, k, v, gk)]
    back, _ = FUNCTIONS["fused_recurrent_gla"](*flipped, None, 0.3, reverse=True)
    torch.testing.assert_close(back.flip(1), y)
    heads, _ = FUNCTIONS["chunk_gla"](*(x.transpose(1, 2) for x in (q, k, v, gk)), 0.3, head_first=True)
    torch.testing.assert_close(heads.transpose(1, 2), y)
    assert FUNCTIONS["chunk_gla"](*(x.half() for x in (q, k, v, gk)))[0].dtype is torch.float16


def test_normalised_linear_attention_is_a_mean_weighted_by_q_k() -> None:
    q, k, v = parts()["q"].abs(), parts()["k"].abs(), parts()["v"]
    weights = torch.einsum("blhk,bmhk->bhlm", q, k).tril()
    wanted = torch.einsum("bhlm,bmhv->blhv", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(FUNCTIONS["chunk_linear_attn"](q, k, v)[0], wanted, rtol=1e-4, atol=1e-4)


def test_slots_without_gates_are_a_softmax_over_time() -> None:
    q, k, v, s = parts()["q"], parts()["k"], parts()["v"], draw(B, L, H, 2)
    y, _ = linear_attention.chunk_gsa(q, k, v, s)
    for t in range(L):
        weights = s[:, : t + 1].softmax(1)  # (b, t, h, m)
        keys, values = (torch.einsum("bthm,bthx->bhmx", weights, x[:, : t + 1]) for x in (k, v))
        read = (torch.einsum("bhk,bhmk->bhm", q[:, t], keys) / K**0.5).softmax(-1)
        torch.testing.assert_close(y[:, t], torch.einsum("bhm,bhmv->bhv", read, values), rtol=1e-4, atol=1e-5)


BLOCKS = [
    mamba_blocks.Mamba(8, d_state=4, bias=True),
    mamba_blocks.Mamba2(8, d_state=4, headdim=4, ngroups=2, D_has_hdim=True),
    mamba_blocks.Mamba2(8, d_state=4, headdim=4, rmsnorm=False, d_ssm=8),
]


@pytest.mark.parametrize("block", BLOCKS)
@torch.no_grad()
def test_a_block_is_its_own_steps(block: torch.nn.Module) -> None:
    x = draw(2, 7, 8)
    states = block.allocate_inference_cache(2, 7)
    ys = [block.step(x[:, t : t + 1], *states)[0] for t in range(7)]
    torch.testing.assert_close(torch.cat(ys, dim=1), block(x), rtol=1e-4, atol=1e-5)


def test_the_compiled_modules_return_the_scan_and_its_last_state() -> None:
    u, delta, a = draw(2, 6, 5), draw(2, 6, 5), -draw(6, 4).abs()
    b, c, d = draw(2, 3, 4, 5), draw(2, 3, 4, 5), draw(6)
    y, last = scans.selective_scan_fn(u, delta, a, b, c, d, delta_softplus=True, return_last_state=True)
    for found in (
        compiled_scans.fwd_core(u, delta, a, b, c, d, None, True, 1),
        compiled_scans.fwd_oflex(u, delta, a, b, c, d, None, True, 1, True),
        compiled_scans.fwd_mamba(u, delta, a, b, c, d, u, None, True),
    ):
        torch.testing.assert_close(found[0], y)
        torch.testing.assert_close(found[1][:, :, -1, 1::2], last)
    torch.testing.assert_close(found[2], y * torch.nn.functional.silu(u))
    assert (
        compiled_scans.fwd_oflex(u.half(), delta, a, b, c, d, None, True, 1, True)[0].dtype is torch.float32
    )


@torch.no_grad()
def test_a_short_convolution_goes_on_where_it_stopped() -> None:
    conv, x = convolutions.ShortConvolution(4, 3), draw(2, 7, 4)
    whole, end = conv(x, output_final_state=True)
    first, cache = conv(x[:, :5], output_final_state=True)
    rest = [conv(x[:, t : t + 1], cache=cache)[0] for t in (5, 6)]
    torch.testing.assert_close(torch.cat([first, *rest], dim=1), whole)
    torch.testing.assert_close(cache, end)


README = """
from mamba_ssm import Mamba
model = Mamba(d_model=8, d_state=4)
model(torch.randn(2, 16, 8))
"""
GATED_DELTA = """
from fla.ops.gated_delta_rule import chunk_gated_delta_rule

class Mixer(nn.Module):
    def forward(self, q, k, v, g, beta):
        return chunk_gated_delta_rule(q, k, v, -g.abs(), beta.sigmoid(), use_qk_l2norm_in_kernel=True)[0]

q = torch.randn(2, 9, 2, 4)
Mixer()(q, q + 1, torch.randn(2, 9, 2, 3), torch.randn(2, 9, 2), torch.randn(2, 9, 2))
"""


@pytest.mark.parametrize("text", [slow(README), slow(GATED_DELTA)])
def test_their_loops_fold(write, text: str) -> None:
    graph = export_subject(load_subject(str(write(text))), Options(gates=False, simplify=False))[0]
    assert any("folded into one Scan" in note for note in graph.notes)
    length = next(iter(graph.traced.inputs.values()))[1]
    dim = next(dim for dim in graph.traced.dims if dim.name == length)
    assert dim.maximum is None or dim.maximum > 1000
