"""Steps over time that compute with their own number t and the length n. h, x: (b, d); tiny."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

L, D = 11, 4
StepOf = Callable[["Counting", Tensor, Tensor, int, int], Tensor]


class Counting(nn.Module):
    """All h of h(t) = step(h(t - 1), x(t), t, n); of several steps, one applied to what the other gives."""

    def __init__(self, *steps: StepOf) -> None:
        super().__init__()
        self.steps = steps
        self.decay = nn.Parameter(torch.linspace(0.4, 0.9, D))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        found = []
        for t in range(x.shape[1]):
            for step in self.steps:
                h = step(self, h, x[:, t], t, x.shape[1])
            found.append(h)
        return torch.stack(found, 1)


def angles(t: int, like: Tensor) -> Tensor:
    """The sine and the cosine of a step, for each row."""
    phase = torch.full((like.shape[0], D // 2), t / 10)
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def noise(t: int, n: int) -> float:
    """A linear schedule, as diffusion has it."""
    return 1e-4 + (0.02 - 1e-4) * t / max(n - 1, 1)


# Integers that count
INTEGERS: dict[str, StepOf] = {
    "running mean": lambda m, h, x, t, n: h + (x - h) / (t + 1),
    "added": lambda m, h, x, t, n: torch.tanh(h + x + t),
    "subtracted from": lambda m, h, x, t, n: torch.tanh((t - x) / 4 + h),
    "from the end": lambda m, h, x, t, n: torch.tanh(h) + x / (n - t),
    "exponent": lambda m, h, x, t, n: h * m.decay ** (n - 1 - t) + x,
    "base": lambda m, h, x, t, n: torch.tanh(h) + x * (t + 1) ** (-m.decay),
    "full of it": lambda m, h, x, t, n: torch.tanh(h + x + torch.full((x.shape[0], D), t) * 0.1),
    "like another": lambda m, h, x, t, n: torch.tanh(h + x + torch.full_like(x, t)),
    "a tensor of it": lambda m, h, x, t, n: torch.tanh(h + x * torch.tensor(t)),
    "compared": lambda m, h, x, t, n: torch.where((x[:, :1] * 3 + 4).long() > t, torch.tanh(h + x), h),
    "compared with floats": lambda m, h, x, t, n: torch.where(x * 5 + 3 > t, torch.tanh(h + x), h),
    "places before it": lambda m, h, x, t, n: torch.tanh(h + x) * (torch.arange(D) <= t),
    "alpha": lambda m, h, x, t, n: torch.tanh(torch.add(h, x, alpha=t + 2)),
}
# Floats that Python computes from them
FLOATS: dict[str, StepOf] = {
    "part of the length": lambda m, h, x, t, n: h * 0.5 + x * (1 - t / n),
    "part of the last": lambda m, h, x, t, n: h * noise(t, n) + x * math.sqrt(1 - noise(t, n)),
    "reciprocal": lambda m, h, x, t, n: torch.lerp(h, x, 1 / (t + 1)),
    "moved": lambda m, h, x, t, n: torch.clamp(h + x, min=-1.0, max=t * 0.25 + 0.5),
    "power": lambda m, h, x, t, n: h * 0.9**t + x,
    "power from the end": lambda m, h, x, t, n: h * 0.5 + x * 0.8 ** (n - 1 - t),
    "bias correction": lambda m, h, x, t, n: torch.tanh(h + 0.01 * x / (1 - 0.999 ** (t + 1))),
    "root": lambda m, h, x, t, n: torch.tanh(h) + x / math.sqrt(t + 1),
    "square": lambda m, h, x, t, n: torch.tanh(h + 0.1 * x * t**2),
    "slow wave": lambda m, h, x, t, n: h * math.cos(t / 10000) + x * math.sin(t / 100),
    "cosine schedule": lambda m, h, x, t, n: h * (0.5 * (1 + math.cos(math.pi * t / n))) + x,
    "exponential": lambda m, h, x, t, n: h * math.exp(-t / n) + x * math.log(t + 2),
    "sign": lambda m, h, x, t, n: torch.tanh(h * 0.5 + x * (-1) ** t),
    "position": lambda m, h, x, t, n: torch.tanh(h + x + angles(t, x)),
    "masked": lambda m, h, x, t, n: (h * 0.5 + x).masked_fill(x > 1, 0.1 * t),
    "of the length alone": lambda m, h, x, t, n: h * (1 / n) + x * n**-0.5,
}
# What is said of numbers that have no formula, with a word of the line
REFUSED: dict[str, tuple[StepOf, str]] = {
    "a table": (
        lambda m, h, x, t, n: h * 0.5 + x * math.sin(1000 * t * t),
        r"step 0 computes with 0\.0, step 1 with 0\.82687\d*, and no formula is known for it",
    ),
    "one that stops": (
        lambda m, h, x, t, n: h * 0.5 + x * min(1.0, t / 100),
        r"with t / 100 at short lengths, and with something else than 1\.01 at length 2053",
    ),
    "shifts": (
        lambda m, h, x, t, n: torch.tanh(h + x.roll(t, 1)),
        r"the number of the step is an argument of roll that must be the same in every step",
    ),
}
