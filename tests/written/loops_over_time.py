"""Ways in which models write a loop over time. (b, l, d) unless said otherwise; tiny, so that eager runs are quick."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, L, D, N = 2, 10, 4, 3


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class InPlace(nn.Module):
    """The state lives in a buffer of length l + 1, the outputs are written into another."""

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], x.shape[1] + 1, x.shape[2])
        y = torch.empty_like(x)
        for t in range(x.shape[1]):
            h[:, t + 1] = h[:, t] * torch.sigmoid(a[:, t]) + x[:, t]
            y[:, t, :] = torch.tanh(h[:, t + 1])
        return y


class KeptBuffer(nn.Module):
    """Only a part of the buffer is written; the rest stays what it was."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, x.flip(1), x], dim=1)  # (b, 3*l, d)
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t])
            y[:, t + 1] = h
        return y


class Accumulated(nn.Module):
    """`y[:, t] += ...`."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = 0.5 * h + x[:, t]
            y[:, t] += h
        return y


class Backwards(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.zeros_like(x[:, 0])
        ys: list[Tensor] = []
        for t in range(x.shape[1] - 1, -1, -1):
            h = torch.tanh(h + x[:, t])
            ys.insert(0, h)
        return torch.stack(ys, dim=1), h


class BothWays(nn.Module):
    """Two loops that follow each other and do the same."""

    def forward(self, x: Tensor) -> Tensor:
        h = g = torch.zeros_like(x[:, 0])
        forwards, backwards = [], []
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t])
            forwards.append(h)
        for t in reversed(range(x.shape[1])):
            g = torch.tanh(g + x[:, t])
            backwards.append(g)
        return torch.cat([torch.stack(forwards, 1), torch.stack(backwards[::-1], 1)], dim=-1)


class Strided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        ys = []
        for t in range(0, x.shape[1], 2):
            h = torch.tanh(h + x[:, t])
            ys.append(h)
        return torch.stack(ys, dim=1)


class Layers(nn.Module):
    """Several layers, each with a loop and weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.GRUCell(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for cell in self.layers:
            h = torch.zeros_like(x[:, 0])
            ys = []
            for t in range(x.shape[1]):
                h = cell(x[:, t], h)
                ys.append(h)
            x = x + torch.stack(ys, dim=1)
        return x


class Stacked(nn.Module):
    """The second loop runs over the list that the first one made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(D, N), nn.GRUCell(N, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = c = x.new_zeros(x.shape[0], N)
        inner = []
        for step in x.unbind(1):
            h, c = self.first(step, (h, c))
            inner.append(h)
        g = x.new_zeros(x.shape[0], D)
        ys = []
        for step in inner:
            g = self.second(step, g)
            ys.append(g)
        return torch.stack(ys, dim=1), c


class LinearAttention(nn.Module):
    """A matrix state: S += k v^T, y = q S."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = q.new_zeros(q.shape[0], q.shape[2], v.shape[2])
        ys = []
        for t in range(q.shape[1]):
            state = state + torch.einsum("bk,bv->bkv", F.elu(k[:, t]) + 1, v[:, t])
            ys.append(torch.einsum("bk,bkv->bv", q[:, t], state))
        return torch.stack(ys, dim=1)


class GatedDelta(nn.Module):
    """The gated delta rule (arXiv:2412.06464), time last but one: (b, h, l, d)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.zeros_like(v)
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        for i in range(q.shape[2]):
            state = state * (-g[:, :, i].abs()).exp().unsqueeze(-1).unsqueeze(-1)
            memory = (state * k[:, :, i].unsqueeze(-1)).sum(dim=-2)
            delta = (v[:, :, i] - memory) * beta[:, :, i].sigmoid().unsqueeze(-1)
            state = state + 0.1 * k[:, :, i].unsqueeze(-1) * delta.unsqueeze(-2)
            out[:, :, i] = (state * q[:, :, i].unsqueeze(-1)).sum(dim=-2)
        return out, state


class Rwkv(nn.Module):
    """RWKV-4's time mixing with the maximum kept aside; the last state is used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.first = nn.Parameter(randn(D)), nn.Parameter(randn(D))

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        num = den = torch.zeros_like(k[:, 0])
        top = torch.zeros_like(k[:, 0]) - 1e38
        decay = -torch.exp(self.decay)
        out = torch.zeros_like(k)
        for t in range(k.shape[1]):
            key, value = k[:, t].float(), v[:, t]
            highest = torch.maximum(top, key + self.first)
            e1, e2 = torch.exp(top - highest), torch.exp(key + self.first - highest)
            out[:, t] = ((e1 * num + e2 * value) / (e1 * den + e2)).to(out.dtype)
            highest = torch.maximum(top + decay, key)
            e1, e2 = torch.exp(top + decay - highest), torch.exp(key - highest)
            num, den, top = e1 * num + e2 * value, e1 * den + e2, highest
        return out


class Window(nn.Module):
    """Each step reads four places of the padded sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(4, D))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 3, 0))
        h = torch.zeros_like(x[:, 0])
        ys = []
        for t in range(x.shape[1]):
            h = 0.5 * h + (padded[:, t : t + 4] * self.weight).sum(1)
            ys.append(h)
        return torch.stack(ys, dim=1)


class TwoBack(nn.Module):
    """The state of two steps before is read as well."""

    def forward(self, x: Tensor) -> Tensor:
        older = old = torch.zeros_like(x[:, 0])
        ys = []
        for t in range(x.shape[1]):
            new = 0.5 * old - 0.2 * older + x[:, t]
            ys.append(new)
            older, old = old, new
        return torch.stack(ys, dim=1)


class FirstStepApart(nn.Module):
    """There is no state before the first step."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = None
        ys = []
        for t in range(x.shape[1]):
            h = x[:, t] if h is None else torch.tanh(0.5 * h + x[:, t])
            ys.append(h)
        assert h is not None
        return torch.stack(ys, dim=1), h


class ZeroNumber(nn.Module):
    """The state starts as a Python number."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor | int = 0
        ys = []
        for t in range(x.shape[1]):
            h = 0.9 * h + x[:, t]
            ys.append(h)
        return torch.stack(ys, dim=2)


class GrowingCat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        ys = x[:, :0]
        h = torch.zeros_like(x[:, :1])
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t : t + 1])
            ys = torch.cat([ys, h], dim=1)
        return ys


class LogSpace(nn.Module):
    """minGRU's scan: h(t) = a(t) h(t - 1) + b(t) by sums of logarithms."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        decay = torch.cumsum(-F.softplus(4 * gate), dim=1)
        return torch.exp(decay + torch.logcumsumexp(x - F.softplus(-4 * gate) - decay, dim=1))


class IndexedAnew(nn.Module):
    """An axis is put in for every step anew, and the step is picked behind it."""

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], D, D)
        ys = []
        for t in range(x.shape[1]):
            h = 0.5 * h + x[:, t, None] * k.mT[:, :, None, t]
            ys.append(h.sum(1))
        return torch.stack(ys, dim=1)


class Rows(nn.Module):
    """Rows of an image after each other: the loop runs over height * width."""

    def forward(self, image: Tensor) -> Tensor:
        batch, _, height, width = image.shape
        x = image.flatten(2).mT
        h = torch.zeros_like(x[:, 0])
        ys = []
        for t in range(height * width):
            h = torch.tanh(0.5 * h + x[:, t])
            ys.append(h)
        return torch.stack(ys, 2).view(batch, -1, height, width)


class RowByRow(nn.Module):
    """A state that starts anew in each row of an image (b, h, w, c)."""

    def forward(self, image: Tensor) -> Tensor:
        rows = []
        for row in range(image.shape[1]):
            h, states = torch.zeros_like(image[:, 0, 0]), []
            for column in range(image.shape[2]):
                h = torch.tanh(0.5 * h + image[:, row, column])
                states.append(h)
            rows.append(torch.stack(states, 1))
        return torch.stack(rows, 1)


class TimeFirst(nn.Module):
    """(l, b, d), a row of weights a step from a table of 300, and the last state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(randn(300, D))

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], D)
        for t in range(x.shape[0]):
            h = torch.tanh(h + x[t] * self.table[t])
        return h


class Heads(nn.Module):
    """An inner loop over heads, which is none over time; the slices are computed in the step."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(*x.shape[:2], 2, -1)
        state = [torch.zeros_like(heads[:, 0, 0]) for _ in range(2)]
        ys = []
        for t in range(x.shape[1]):
            for k in range(2):
                state[k] = torch.tanh(state[k] + heads[:, t, k].exp())
            ys.append(torch.cat(state, dim=-1))
        return torch.stack(ys, dim=1)


class ByChannel(nn.Module):
    """A loop over time inside of one over channels; each writes one number a step."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for c in range(x.shape[2]):
            h = torch.zeros_like(x[:, 0, 0])
            for t in range(x.shape[1]):
                h = torch.tanh(h + x[:, t, c])
                y[:, t, c] = h * x[:, t].sum(-1)
        return y


class Sequential(nn.Module):
    """All states first, then one product with C, as mambapy has it."""

    def forward(self, delta: Tensor, u: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a = -torch.arange(1.0, N + 1)
        decay = torch.exp(F.softplus(delta).unsqueeze(-1) * a)  # (b, l, d, n)
        inputs = F.softplus(delta).unsqueeze(-1) * b.unsqueeze(2) * u.unsqueeze(-1)
        h = torch.zeros(u.size(0), u.size(2), N)
        hs = []
        for t in range(u.size(1)):
            h = decay[:, t] * h + inputs[:, t]
            hs.append(h)
        return (torch.stack(hs, dim=1) @ c.unsqueeze(-1)).squeeze(3)


class TimeLast(nn.Module):
    """(b, d, n, l) and outputs stacked behind, as transformers' slow Mamba has it."""

    def forward(self, a: Tensor, u: Tensor, c: Tensor) -> Tensor:
        h = torch.zeros_like(u[..., 0])
        ys = []
        for i in range(u.shape[-1]):
            h = torch.sigmoid(a[:, :, :, i]) * h + u[:, :, :, i]
            y = torch.matmul(h.to(c.dtype), c[:, i, :].unsqueeze(-1))  # (b, d, 1)
            ys.append(y[:, :, 0])
        return torch.stack(ys, dim=-1)


class Reversed(nn.Module):
    """Negative indices."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        y = torch.zeros_like(x)
        for t in range(1, x.shape[1] + 1):
            h = torch.tanh(h * 0.5 + x[:, -t])
            y[:, -t] = h
        return y


class Split(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, :1])
        ys = []
        for part in x.split(1, dim=1):
            h = torch.tanh(h + part)
            ys.append(h)
        return torch.cat(ys, dim=1)


class FirstStepAgain(nn.Module):
    """Every step reads the first step's value as well, which is no loop-carried value."""

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor] = []
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t])
            states.append(h)
            h = h + states[0].exp()
        return h


x = randn(B, L, D)
LOOPS: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "in_place": (InPlace(), (x, randn(B, L, D) + 1)),
    "kept_buffer": (KeptBuffer(), (x,)),
    "accumulated": (Accumulated(), (x,)),
    "log_space": (LogSpace(), (x, randn(B, L, D))),
    "indexed_anew": (IndexedAnew(), (x, randn(B, L, D))),
    "backwards": (Backwards(), (x,)),
    "both_ways": (BothWays(), (x,)),
    "strided": (Strided(), (x,)),
    "layers": (Layers(), (x,)),
    "stacked": (Stacked(), (x,)),
    "linear_attention": (LinearAttention(), (x, randn(B, L, D) - 1, randn(B, L, N))),
    "gated_delta": (
        GatedDelta(),
        (randn(B, 3, L, D), randn(B, 3, L, D), randn(B, 3, L, N), randn(B, 3, L), randn(B, 3, L)),
    ),
    "rwkv": (Rwkv(), (x, randn(B, L, D) * 2)),
    "window": (Window(), (x,)),
    "two_back": (TwoBack(), (x,)),
    "first_step_apart": (FirstStepApart(), (x,)),
    "zero_number": (ZeroNumber(), (x,)),
    "growing_cat": (GrowingCat(), (x,)),
    "time_first": (TimeFirst(), (randn(L, B, D),)),
    "heads": (Heads(), (x,)),
    "by_channel": (ByChannel(), (x,)),
    "sequential": (Sequential(), (x, randn(B, L, D), randn(B, L, N), randn(B, L, N))),
    "time_last": (TimeLast(), (randn(B, D, N, L), randn(B, D, N, L), randn(B, L, N))),
    "reversed": (Reversed(), (x,)),
    "split": (Split(), (x,)),
    "first_step_again": (FirstStepAgain(), (x,)),
}
TIME_AXIS = {"gated_delta": 2, "time_first": 0, "time_last": 3}
