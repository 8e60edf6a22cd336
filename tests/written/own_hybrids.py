"""Language models of a user's kind: loops over tokens, windows and attention, with and without states at their door."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_export.models.sparse_moe import SparseMoe

WORDS, D, HEADS = 40, 16, 2


def angles(length: int) -> tuple[Tensor, Tensor]:
    """Of rotary positions: (length, 8) each."""
    turns = torch.arange(length)[:, None] * 0.5 ** torch.arange(D // HEADS // 2)
    return torch.cat([turns, turns], 1).cos(), torch.cat([turns, turns], 1).sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


class Plain(nn.Module):
    """Keeps nothing: a causal convolution, a gated loop, attention with rotary positions, experts."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, D)
        self.conv = nn.Conv1d(D, D, 3, groups=D, padding=2)
        self.gate, self.qkv, self.out = nn.Linear(D, D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.experts = SparseMoe(D, 2 * D, 4, 2)
        self.head = nn.Linear(D, WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        batch, length, _ = x.shape
        x = x + self.conv(x.transpose(1, 2))[..., :length].transpose(1, 2)
        gates, h, ys = torch.sigmoid(self.gate(x)), x.new_zeros(batch, D), []
        for t in range(length):
            h = gates[:, t] * h + (1 - gates[:, t]) * x[:, t]
            ys.append(h)
        x = x + torch.stack(ys, 1)
        q, k, v = (y.view(batch, length, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        cos, sin = angles(length)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, D))
        logits: Tensor = self.head(x + self.experts(x)[0])
        return logits


class Shifted(nn.Module):
    """Keeps nothing: the token before, a mean of all tokens so far, attention by products with a bias by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, D), nn.Embedding(64, D)
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.head = nn.Linear(D, WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.words(input_ids) + self.places(torch.arange(length))
        x = 0.6 * x + 0.4 * F.pad(x, (0, 0, 1, -1))
        mean, ys = torch.zeros_like(x[:, 0]), []
        for t in range(length):
            mean = mean + (x[:, t] - mean) / (t + 1)
            ys.append(mean)
        x = x + torch.stack(ys, 1)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        scores = self.q(x) @ self.k(x).transpose(1, 2) / D**0.5 - 0.1 * distance
        scores = scores.masked_fill(distance < 0, -1e9)
        logits: Tensor = self.head(x + scores.softmax(-1) @ self.v(x))
        return logits


@dataclass
class Kept:
    """What a layer keeps: (batch, D, 2), (batch, D), and keys and values (batch, HEADS, past, D / HEADS)."""

    window: Tensor
    state: Tensor
    keys: Tensor
    values: Tensor


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, groups=D)
        self.gate, self.qkv, self.out = nn.Linear(D, D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        batch, new, _ = x.shape
        window = torch.cat([kept.window, x.transpose(1, 2)], 2)
        x = x + self.conv(window).transpose(1, 2)
        gates, state, ys = torch.sigmoid(self.gate(x)), kept.state, []
        for t in range(new):
            state = gates[:, t] * state + (1 - gates[:, t]) * x[:, t]
            ys.append(state)
        x = x + torch.stack(ys, 1)
        q, k, v = (y.view(batch, new, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        keys, values = torch.cat([kept.keys, k], 2), torch.cat([kept.values, v], 2)
        count = keys.shape[2]
        causal = torch.ones(count, count, dtype=torch.bool).tril()[count - new :]
        seen = F.scaled_dot_product_attention(q, keys, values, attn_mask=causal)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, new, D))
        return x, Kept(window[..., -2:], state, keys, values)


class Stateful(nn.Module):
    """Takes what its two layers keep, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids: Tensor, states: list[Kept]) -> tuple[Tensor, list[Kept]]:
        x, after = self.words(input_ids), []
        for layer, kept in zip(self.layers, states, strict=True):
            x, now = layer(x, kept)
            after.append(now)
        return self.head(x), after


class Tuples(Stateful):
    """The same with a tuple for what each layer keeps."""

    def forward(
        self, input_ids: Tensor, states: list[tuple[Tensor, ...]]
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:  # type: ignore[override]
        logits, after = super().forward(input_ids, [Kept(*kept) for kept in states])
        return logits, [(kept.window, kept.state, kept.keys, kept.values) for kept in after]


def kept(past: int = 3) -> Kept:
    """What a layer keeps after so many tokens."""
    return Kept(torch.randn(2, D, 2), torch.randn(2, D), *torch.randn(2, 2, HEADS, past, D // HEADS).unbind())


def example(model: nn.Module) -> dict[str, object]:
    """Inputs of any of them."""
    ids = {"input_ids": torch.randint(3, 30, (2, 7))}
    if isinstance(model, Tuples):
        return {**ids, "states": [tuple(vars(kept()).values()) for _ in range(2)]}
    return {**ids, "states": [kept(), kept()]} if isinstance(model, Stateful) else ids
