"""Modules as their users write them that keep something of earlier tokens in an object of a class of their own."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, D, HEADS = 30, 8, 2


class Layer(nn.Module):
    """Attention over what a cache holds, and a gated loop."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.qkv, self.gate = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def attended(self, x: Tensor, update: Any) -> Tensor:
        batch, new, _ = x.shape
        q, k, v = (y.view(batch, new, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        keys, values = update(k, v)
        count = keys.shape[2]
        causal = torch.ones(count, count, dtype=torch.bool).tril()[count - new :]
        seen = F.scaled_dot_product_attention(q, keys, values, attn_mask=causal)
        return x + seen.transpose(1, 2).reshape(batch, new, D)

    def looped(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        gates, ys = torch.sigmoid(self.gate(x)), []
        for t in range(x.shape[1]):
            state = gates[:, t] * state + (1 - gates[:, t]) * x[:, t]
            ys.append(state)
        return x + torch.stack(ys, 1), state


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)
        self.places = nn.Embedding(128, D)
        self.layers = nn.ModuleList([Layer(0), Layer(1)])


class MyCache:
    """As transformers' older caches: lists that grow, and a count."""

    def __init__(self) -> None:
        self.key_cache: list[Tensor] = []
        self.value_cache: list[Tensor] = []
        self.seen_tokens = 0

    def update(self, k: Tensor, v: Tensor, place: int) -> tuple[Tensor, Tensor]:
        if place == 0:
            self.seen_tokens += k.shape[2]
        if len(self.key_cache) <= place:
            self.key_cache.append(k)
            self.value_cache.append(v)
        else:
            self.key_cache[place] = torch.cat([self.key_cache[place], k], 2)
            self.value_cache[place] = torch.cat([self.value_cache[place], v], 2)
        return self.key_cache[place], self.value_cache[place]


class Optional(Base):
    """Makes a cache if it is given none, and returns it; positions come from its count."""

    def forward(self, input_ids: Tensor, cache: MyCache | None = None) -> tuple[Tensor, MyCache]:
        cache = MyCache() if cache is None else cache
        places = torch.arange(input_ids.shape[1]) + cache.seen_tokens
        x = self.words(input_ids) + self.places(places)
        for layer in self.layers:
            x = layer.attended(x, lambda k, v, at=layer.place: cache.update(k, v, at))
        return self.head(x), cache


class InPlace(Optional):
    """Is given an empty cache, changes it, and returns logits alone."""

    def forward(self, input_ids: Tensor, cache: MyCache) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids, cache)[0]


@dataclass
class States:
    """What each layer keeps, nothing at first."""

    rows: list[Tensor | None] = field(default_factory=lambda: [None, None])


class Filled(Base):
    """A dataclass whose entries are None at first, and are replaced in place."""

    def forward(self, input_ids: Tensor, states: States) -> Tensor:
        x = self.words(input_ids)
        for layer in self.layers:
            before = states.rows[layer.place]
            x, states.rows[layer.place] = layer.looped(
                x, torch.zeros_like(x[:, 0]) if before is None else before
            )
        return self.head(x)


class Written(Base):
    """A list of tensors that are written into: (batch, D, layers)."""

    def forward(self, input_ids: Tensor, state: list[Tensor] | None = None) -> dict[str, Any]:
        x = self.words(input_ids)
        if state is None:
            state = [x.new_zeros(x.shape[0], D, 2)]
        for layer in self.layers:
            x, state[0][:, :, layer.place] = layer.looped(x, state[0][:, :, layer.place].clone())
        return {"logits": self.head(x), "state": state}


class Plain:
    """What two layers keep, in attributes."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second


class Returned(Base):
    """A new object for each call; the example gives one."""

    def forward(self, input_ids: Tensor, kept: Plain) -> tuple[Tensor, Plain]:
        x, first = self.layers[0].looped(self.words(input_ids), kept.first)
        x, second = self.layers[1].looped(x, kept.second)
        return self.head(x), Plain(first, second)


Hidden = namedtuple("Hidden", "h c")


class Recurrent(nn.Module):
    """PyTorch's own recurrent layer, whose states are (layers, batch, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)
        self.lstm = nn.LSTM(D, D, 2, batch_first=True)

    def forward(self, input_ids: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Hidden]:
        x, after = self.lstm(self.words(input_ids), None if hidden is None else tuple(hidden))
        return self.head(x), Hidden(*after)


class Counts(Base):
    """Adds a count of tokens that nothing else tells: an int is a constant in a graph."""

    def forward(self, input_ids: Tensor, cache: Any) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]) + cache.seen)
        x, cache.state = self.layers[0].looped(x, cache.state)
        cache.seen += input_ids.shape[1]
        return self.head(x)


class Seen(Plain):
    def __init__(self) -> None:
        self.state, self.seen = torch.zeros(2, D), 0


KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "optional": (Optional, {}),
    "in place": (InPlace, {"cache": MyCache}),
    "filled": (Filled, {"states": States}),
    "written": (Written, {}),
    "returned": (Returned, {"kept": lambda: Plain(torch.zeros(2, D), torch.zeros(2, D))}),
    "recurrent": (Recurrent, {}),
}
"""By what happens to the object: the module, and what makes the rest of its example."""


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def example(more: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, WORDS, (2, 7)), **{name: make() for name, make in more.items()}}
