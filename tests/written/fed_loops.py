"""Recurrences with a decay for each key, and such whose states are fed with what is read from them. Tiny.

Letters: b batch, l length, h heads, n the keys' axis, that is read over, p the values'.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from linear_loops import B, L, randn
from torch import Tensor, nn

Step = Callable[..., tuple[Tensor, Tensor]]


class FromState(nn.Module):
    """A loop over its step, from a given state (b, h, n, p) or, of `rows` of values, (b, h, p, n)."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        ys = []
        for t in range(q.shape[1]):
            s, y = self.step(s, q[:, t], k[:, t], v[:, t], g[:, t], a[:, t], b[:, t])
            ys.append(y)
        return torch.stack(ys, 1), s


def erased(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What RWKV-7 reads by and stores under: a direction, and at most its opposite."""
    a = F.normalize(a, dim=-1)
    return -a, a * torch.sigmoid(b)


def gla(s, q, k, v, g, a, b):
    """A decay for each key, exp(g) with g <= 0, read behind the step."""
    s = torch.exp(g)[..., None] * s + k[..., None] * v[..., None, :]
    return s, (s * q[..., None]).sum(-2)


def gla_before(s, q, k, v, g, a, b):
    """The same, read before the step."""
    y = (q[..., None, :] @ s).squeeze(-2)
    return torch.exp(g)[..., None] * s + k[..., None] @ v[..., None, :], y


def signed(s, q, k, v, g, a, b):
    """Decays of both signs, some above 1: no logarithm."""
    s = (1.2 * torch.tanh(a))[..., None] * s + k[..., None] * v[..., None, :]
    return s, (s * q[..., None]).sum(-2)


def key_delta(s, q, k, v, g, a, b):
    """A delta rule in a state whose keys decay."""
    k = F.normalize(k, dim=-1)
    s = torch.exp(g)[..., None] * s
    held = (s * k[..., None]).sum(-2)
    s = s + k[..., None] * (v - held)[..., None, :]
    return s, (s * q[..., None]).sum(-2)


def rwkv7(s, q, k, v, g, a, b):
    """RWKV-7 (arXiv:2503.14456), the state (p, n): what is read is added, from the state before the decay."""
    a, b = erased(a, b)
    read = s @ a[..., None]
    s = s * torch.exp(g)[..., None, :] + read @ b[..., None, :] + v[..., None] @ k[..., None, :]
    return s, (s @ q[..., None]).squeeze(-1)


def rwkv7_by_a_matrix(s, q, k, v, g, a, b):
    """The same with the state times a matrix of rank one."""
    a, b = erased(a, b)
    s = s * torch.exp(g)[..., None, :] + s @ (a[..., None] @ b[..., None, :]) + v[..., None] * k[..., None, :]
    return s, (s @ q[..., None]).squeeze(-1)


def matrix_from_the_left(s, q, k, v, g, a, b):
    """The state (n, p), times the matrix from the other side."""
    a, b = erased(a, b)
    s = torch.exp(g)[..., None] * s + (b[..., None] @ a[..., None, :]) @ s + k[..., None] * v[..., None, :]
    return s, torch.einsum("bhn,bhnp->bhp", q, s)


def one_decay(s, q, k, v, g, a, b):
    """Fed, with one decay a head; read before the step; subtracted, from the decayed state."""
    a, b = erased(a, b)
    y = torch.einsum("bhn,bhnp->bhp", q, s)
    s = torch.exp(g.mean(-1))[..., None, None] * s
    s = s + k[..., None] * v[..., None, :] - b[..., None] * torch.einsum("bhn,bhnp->bhp", -a, s)[..., None, :]
    return s, y


def no_decay(s, q, k, v, g, a, b):
    """Fed, without decay; another key than the one it stores under: k (v - r)."""
    a, b = erased(a, b)
    held = torch.einsum("bhn,bhnp->bhp", a, s)
    s = s + 0.3 * b[..., None] * (v + held)[..., None, :]
    return s, torch.einsum("bhn,bhnp->bhp", q, s)


def fed_by_its_square(s, q, k, v, g, a, b):
    """No linear recurrence."""
    held = torch.einsum("bhn,bhnp->bhp", a, s)
    s = (
        torch.exp(g)[..., None] * s
        + k[..., None] * v[..., None, :]
        + b[..., None] * (held * held)[..., None, :]
    )
    return s, torch.einsum("bhn,bhnp->bhp", q, s)


def fed_by_two(s, q, k, v, g, a, b):
    """Two readings."""
    held, other = torch.einsum("bhn,bhnp->bhp", a, s), torch.einsum("bhn,bhnp->bhp", b, s)
    s = torch.exp(g)[..., None] * s + k[..., None] * v[..., None, :] + b[..., None] * held[..., None, :]
    s = s + a[..., None] * other[..., None, :]
    return s, torch.einsum("bhn,bhnp->bhp", q, s)


def fed_by_the_next(s, q, k, v, g, a, b):
    """What is read of the state behind a part of the step."""
    s = torch.exp(g)[..., None] * s + k[..., None] * v[..., None, :]
    held = torch.einsum("bhn,bhnp->bhp", a, s)
    s = s + b[..., None] * held[..., None, :]
    return s, torch.einsum("bhn,bhnp->bhp", q, s)


ROWS_OF_VALUES = {"rwkv7", "rwkv7_by_a_matrix"}
LOOPS: dict[str, Step] = {
    step.__name__: step
    for step in (
        gla, gla_before, signed, key_delta, rwkv7, rwkv7_by_a_matrix, matrix_from_the_left, one_decay, no_decay,
    )
}  # fmt: skip
REFUSED: dict[str, tuple[Step, str]] = {
    "fed_by_its_square": (fed_by_its_square, "multiplies what it reads|computed from what was read"),
    "fed_by_two": (fed_by_two, "adds several products"),
    "fed_by_the_next": (fed_by_the_next, "not read from the state before|adds several products"),
}


def inputs(name: str, heads: int = 3, keys: int = 4, values: int = 5) -> tuple[Tensor, ...]:
    """Of a loop, as an example."""
    of_keys = [randn(B, L, heads, keys) for _ in range(5)]
    q, k, g, a, b = of_keys
    state = (values, keys) if name in ROWS_OF_VALUES else (keys, values)
    return q, k, randn(B, L, heads, values), g, a, b, randn(B, heads, *state)


def example(name: str, length: int, batch: int, strongest: float, *sizes: int) -> dict[str, Tensor]:
    """Other values: logarithms of decays from -strongest to 0, some of them 0."""
    choose = torch.Generator().manual_seed(1000 * length + batch)
    found = {}
    for key, value in zip("qkvgabs", inputs(name, *sizes), strict=True):
        shape = (batch, *value.shape[1:]) if key == "s" else (batch, length, *value.shape[2:])
        found[key] = torch.randn(shape, generator=choose)
    places = torch.rand(found["g"].shape, generator=choose)
    found["g"] = torch.where(places < 0.2, 0.0, -strongest * places)
    return found
