"""Complex numbers become pairs of real ones: every operator against complex128, through the trace and onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_cases import only
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.tracing.complex_numbers import without_complex
from moe_export.export.tracing.complex_writer import is_complex
from moe_export.float64 import double_module, in_float64

REAL = torch.tensor([[True, False, True], [False, False, True]])
AT = torch.tensor([2, 0])


class Parts(nn.Module):
    """Operators on complex numbers whose parts are the inputs, each result as pairs along a last axis."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.weight = nn.Parameter(torch.tensor([0.5 - 0.25j, -1.5 + 2j, 0.75 + 0.125j]))

    def forward(self, x, y):
        z, v = torch.complex(x, y), torch.complex(y, x) - 0.5
        found = [function(z, v, x, self.weight) for function in self.functions]
        return tuple(
            torch.view_as_real(each.resolve_conj()) if each.is_complex() else each.resolve_neg()
            for each in found
        )


def written(shape, state):
    buffer = torch.zeros(shape, dtype=torch.complex64)
    buffer[:, 1] = state[:, 0]
    buffer[0] += 2j
    buffer.real[:, 2] = 3.0
    return buffer


GROUPS = {
    "sums": [
        lambda z, v, x, w: z + v,
        lambda z, v, x, w: z - x,
        lambda z, v, x, w: x - z,
        lambda z, v, x, w: torch.add(z, v, alpha=2),
        lambda z, v, x, w: torch.sub(v, x, alpha=3),
        lambda z, v, x, w: 1 - z,
        lambda z, v, x, w: z + (1 - 2j),
        lambda z, v, x, w: x + 1j,
        lambda z, v, x, w: x[:, :1] + 1j * x[:1],
        lambda z, v, x, w: -z,
        lambda z, v, x, w: z.sum(),
        lambda z, v, x, w: z.sum(1, keepdim=True),
        lambda z, v, x, w: z.mean((0, 1)),
        lambda z, v, x, w: z.mean(),
        lambda z, v, x, w: z.cumsum(1),
        lambda z, v, x, w: torch.lerp(z, v, 0.25),
    ],
    "products": [
        lambda z, v, x, w: z * v,
        lambda z, v, x, w: x * z,
        lambda z, v, x, w: z * 2,
        lambda z, v, x, w: 1j * z,
        lambda z, v, x, w: 1j * x,
        lambda z, v, x, w: (2 - 1j) * z,
        lambda z, v, x, w: w * z,
        lambda z, v, x, w: z.square(),
        lambda z, v, x, w: torch.addcmul(z, v, z, value=0.5),
        lambda z, v, x, w: z @ v.T,
        lambda z, v, x, w: z.mT @ x.to(z.dtype),
        lambda z, v, x, w: z @ w,
        lambda z, v, x, w: torch.mm(z, v.mH),
        lambda z, v, x, w: torch.bmm(z[None], v.adjoint()[None]),
        lambda z, v, x, w: torch.addmm(z[:, :2] @ v[:, :2], z, v.T, beta=2, alpha=1j),
        lambda z, v, x, w: torch.outer(w, z[0]),
        lambda z, v, x, w: torch.dot(w, z[0]),
        lambda z, v, x, w: torch.vdot(w, z[0]),
        lambda z, v, x, w: torch.einsum("bi,bj->bij", z, v),
        lambda z, v, x, w: torch.einsum("bi,i,bi->b", z, w, v),
        lambda z, v, x, w: torch.einsum("bi,i->b", x.to(z.dtype), w),
        lambda z, v, x, w: nn.functional.linear(z, v, z[0, :2]),
        lambda z, v, x, w: nn.functional.conv1d(z[None], v[..., None].mT.reshape(2, 1, 3), w[:2], groups=2),
    ],
    "quotients": [
        lambda z, v, x, w: z / v,
        lambda z, v, x, w: z / 2,
        lambda z, v, x, w: z / (1 - 2j),
        lambda z, v, x, w: x / z,
        lambda z, v, x, w: 1 / z,
        lambda z, v, x, w: z / (x + 3),
        lambda z, v, x, w: z / (1j * (x + 3)),
        lambda z, v, x, w: (2 + 1j) / v,
        lambda z, v, x, w: z / 1e30 / (v / 1e30),
        lambda z, v, x, w: z * 1e-30 / (v * 1e-30),
        lambda z, v, x, w: z.reciprocal(),
        lambda z, v, x, w: z / w,
        lambda z, v, x, w: torch.sgn(z),
    ],
    "functions": [
        lambda z, v, x, w: z.abs(),
        lambda z, v, x, w: (z * 1e-25).abs() * 1e25,
        lambda z, v, x, w: (1j * x).abs(),
        lambda z, v, x, w: z.angle(),
        lambda z, v, x, w: torch.angle((x - 0.3).to(z.dtype)),
        lambda z, v, x, w: torch.polar(x.abs(), x),
        lambda z, v, x, w: z.exp(),
        lambda z, v, x, w: torch.exp(1j * x),
        lambda z, v, x, w: torch.exp(x + 2j),
        lambda z, v, x, w: z.log(),
        lambda z, v, x, w: z.sqrt(),
        lambda z, v, x, w: torch.rsqrt(z),
        lambda z, v, x, w: torch.sin(z),
        lambda z, v, x, w: torch.cos(z),
        lambda z, v, x, w: torch.sinh(z),
        lambda z, v, x, w: torch.cosh(z),
        lambda z, v, x, w: torch.tanh(z),
        lambda z, v, x, w: torch.tanh(z * 40),
        lambda z, v, x, w: torch.sigmoid(z),
        lambda z, v, x, w: torch.linalg.vector_norm(z, dim=-1),
        lambda z, v, x, w: z.norm(),
    ],
    "powers": [
        lambda z, v, x, w: z**2,
        lambda z, v, x, w: z**3,
        lambda z, v, x, w: z**7,
        lambda z, v, x, w: z**-2,
        lambda z, v, x, w: z**0,
        lambda z, v, x, w: z**0.5,
        lambda z, v, x, w: z**1.7,
        lambda z, v, x, w: z**100 / z.abs() ** 100,
        lambda z, v, x, w: w[:, None] ** torch.arange(5),
        lambda z, v, x, w: z**v,
        lambda z, v, x, w: 2**z,
        lambda z, v, x, w: (1 + 1j) ** z,
        lambda z, v, x, w: z ** (0.5 - 1j),
    ],
    "parts": [
        lambda z, v, x, w: z.real,
        lambda z, v, x, w: z.imag,
        lambda z, v, x, w: z.conj(),
        lambda z, v, x, w: z.conj().imag,
        lambda z, v, x, w: z.conj().resolve_conj() * v,
        lambda z, v, x, w: torch.view_as_complex(torch.stack([x, -x], -1)),
        lambda z, v, x, w: torch.view_as_real(z).flatten(1),
        lambda z, v, x, w: x.to(torch.complex64),
        lambda z, v, x, w: x.to(torch.complex64).imag,
        lambda z, v, x, w: (1j * x).real,
        lambda z, v, x, w: z.isfinite(),
        lambda z, v, x, w: (z / 0).isnan() | (z / 0).isinf(),
        lambda z, v, x, w: z == x,
        lambda z, v, x, w: z != z.conj(),
        lambda z, v, x, w: z.to(torch.complex128).abs().float(),
    ],
    "shapes": [
        lambda z, v, x, w: z.unsqueeze(-1),
        lambda z, v, x, w: z[:, None, 1:],
        lambda z, v, x, w: z[..., -1],
        lambda z, v, x, w: z[:, [2, 0]],
        lambda z, v, x, w: z[:, AT],
        lambda z, v, x, w: z.index_select(1, AT),
        lambda z, v, x, w: z.reshape(-1),
        lambda z, v, x, w: z.view(-1, 3, 1).expand(-1, 3, 2),
        lambda z, v, x, w: z.T.contiguous(),
        lambda z, v, x, w: z.permute(1, 0).flatten(),
        lambda z, v, x, w: z[None].movedim(0, -1).squeeze(-1),
        lambda z, v, x, w: z.unflatten(1, (3, 1)).transpose(-1, -2),
        lambda z, v, x, w: z.flip(-1),
        lambda z, v, x, w: z.roll(1, -1),
        lambda z, v, x, w: z.repeat(1, 2),
        lambda z, v, x, w: nn.functional.pad(z, (1, 2)),
        lambda z, v, x, w: torch.cat([z, v, x.to(z.dtype)], 1),
        lambda z, v, x, w: torch.stack([z, v], 1),
        lambda z, v, x, w: z.split(2, 1)[1],
        lambda z, v, x, w: z.unbind(1)[2] - z.chunk(3, 1)[0][:, 0],
        lambda z, v, x, w: torch.where(x > 0, z, v),
        lambda z, v, x, w: torch.where(x > 0, z, 0),
        lambda z, v, x, w: torch.where(x > 0, x, 1j),
        lambda z, v, x, w: z.masked_fill(x > 0, 2 - 1j),
        lambda z, v, x, w: z.tril(),
        lambda z, v, x, w: z.repeat_interleave(2, 1),
        lambda z, v, x, w: torch.gather(z, 1, AT.expand(2, 2)),
    ],
    "made": [
        lambda z, v, x, w: torch.zeros_like(z) + x,
        lambda z, v, x, w: torch.zeros(2, 3, dtype=torch.complex64) + z,
        lambda z, v, x, w: torch.ones_like(x, dtype=torch.complex64) * z,
        lambda z, v, x, w: torch.full((3,), 1 - 2j) * z,
        lambda z, v, x, w: z.new_full((3,), 2j) + z,
        lambda z, v, x, w: torch.eye(3, dtype=torch.complex64) @ w,
        lambda z, v, x, w: torch.tensor([1j, 2.0, 1 - 1j]) * z,
        lambda z, v, x, w: z.new_zeros(z.shape[0], z.shape[1]) - z,
        lambda z, v, x, w: written((2, 3), z),
    ],
}


@pytest.mark.parametrize("group", only(("products", "parts"), GROUPS))
def test_every_operator_is_what_it_is_in_complex128(tools, group):
    torch.manual_seed(1)
    x, y = torch.randn(2, 2, 3)
    model = Parts(GROUPS[group])
    graph = tools.graph(model, x, y)
    assert not any(is_complex(node.meta.get("val")) for node in graph.traced.program.graph.nodes)
    given = [(x, y), (torch.randn(2, 3), torch.randn(2, 3)), (torch.zeros(2, 3), -x.abs()), (-y.abs(), x)]
    for one, other in given:
        found = tools.run(graph.model, x=one, y=other).values()
        with torch.no_grad():
            wanted, own = wide(model, one, other), model(one, other)
        for place, (array, exact, eager) in enumerate(zip(found, wanted, own, strict=True)):
            assert array.shape == exact.shape, (group, place)
            near(array, exact.numpy(), eager.numpy(), f"{group}, operator {place}")


def wide(model, x, y):
    """The model in complex128."""
    with in_float64():
        return Parts.forward(double_module(model), x.double(), y.double())


def near(found, exact, eager, what):
    """As near to the exact result as PyTorch in complex64 is, up to a few roundings; what is not finite is so there."""
    if found.dtype == bool:
        np.testing.assert_array_equal(found, eager, what)
        return
    known = np.isfinite(exact) & np.isfinite(eager)
    scale = np.abs(exact[known]).max(initial=0.0)
    own = np.abs(eager - exact)[known].max(initial=0.0)
    error = np.abs(found - exact)[known].max(initial=0.0)
    assert error <= 4 * own + 3e-6 * scale, (what, error, own, scale)


def test_complex_weights_keep_their_names_as_pairs(tools):
    model = Parts([lambda z, v, x, w: w * z])
    graph = tools.graph(model, torch.randn(2, 3), torch.randn(2, 3))
    weights = graph.model.graph.initializers
    for part in ("real", "imag"):
        wanted = getattr(model.weight.detach(), part).numpy()
        np.testing.assert_array_equal(weights[f"weight.{part}"].const_value.numpy(), wanted)


def test_a_program_without_complex_numbers_is_returned_as_it_is(tools):
    program = tools.graph(nn.Linear(3, 2), torch.randn(2, 3)).traced.program
    assert without_complex(program) is program


def test_an_operator_without_a_rule_is_named_with_its_line(tools):
    class Product(nn.Module):
        def forward(self, x):
            return torch.complex(x, x).prod(1).abs()

    with pytest.raises(
        NotExportableError, match=r"aten\.prod\.dim_int of complex numbers has no ONNX form"
    ) as caught:
        tools.graph(Product(), torch.randn(2, 3))
    line = Product.forward.__code__.co_firstlineno + 1
    assert str(caught.value.where).splitlines() == [
        f"{__file__}:{line}", "return torch.complex(x, x).prod(1).abs()"
    ]  # fmt: skip
    assert "x.real, x.imag" in caught.value.hint


class Diagonal(nn.Module):
    """A diagonal complex state, as S5 has it, step by step."""

    def __init__(self, inputs=3, states=4):
        super().__init__()
        self.rate = nn.Parameter(torch.complex(-torch.rand(states), 3 * torch.randn(states)))
        self.inward = nn.Parameter(torch.randn(states, inputs, dtype=torch.complex64))
        self.outward = nn.Parameter(torch.randn(inputs, states, dtype=torch.complex64))

    def forward(self, u):
        decay = torch.exp(self.rate * 0.1)
        inward = ((decay - 1) / self.rate)[:, None] * self.inward
        state = torch.zeros(u.shape[0], len(decay), dtype=torch.complex64)
        found = []
        for t in range(u.shape[1]):
            state = decay * state + u[:, t].to(torch.complex64) @ inward.T
            found.append((state @ self.outward.T).real)
        return torch.stack(found, 1)


def test_a_loop_over_a_complex_state_is_one_scan_over_two_real_ones(tools):
    torch.manual_seed(0)
    model = Diagonal()
    graph = tools.graph(model, torch.randn(2, 6, 3))
    (scan,) = [node for node in graph.model.graph if node.op_type == "Scan"]
    assert len(scan.outputs) == 3
    for length in (1, 2, 7, 100):
        u = torch.randn(3, length, 3)
        (found,) = tools.run(graph.model, u=u).values()
        with torch.no_grad(), in_float64():
            wanted = double_module(model)(u.double())
        near(found, wanted.numpy(), model(u).detach().numpy(), length)


class Rotary(nn.Module):
    """Rotary embeddings by complex numbers, with their table as a buffer."""

    def __init__(self, width=6, longest=64):
        super().__init__()
        turns = torch.outer(torch.arange(longest), 1e4 ** -(torch.arange(0, width, 2) / width))
        self.register_buffer("turns", torch.polar(torch.ones_like(turns), turns), persistent=False)

    def forward(self, q):
        pairs = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: q.shape[1], None]).flatten(3).type_as(q)


def test_rotary_embeddings(tools):
    graph = tools.graph(Rotary(), torch.randn(2, 5, 3, 6))
    batch, length, *_ = graph.traced.inputs["q"]
    assert batch.isidentifier()
    assert length.isidentifier()
    for length in (1, 2, 64):
        tools.equal(graph, torch.randn(3, length, 3, 6), atol=1e-6)
