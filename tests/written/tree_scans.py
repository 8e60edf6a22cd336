"""Associative scans over a tree, in plain Python, that are given their operator, as libraries write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def linear(earlier: Sequence[Tensor], later: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """h(t) = a(t) h(t - 1) + x(t), as an operator on pairs (a, x)."""
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def tree_scan(operator: Callable[..., Any], elements: Any, axis: int = 0, reverse: bool = False) -> Any:
    """The scan of odd and even positions apart, along any axis."""
    leaves = list(elements)

    def part(tensor: Tensor, start: int, stop: int | None = None, step: int = 1) -> Tensor:
        index = [slice(None)] * tensor.ndim
        index[axis] = slice(start, stop, step)
        return tensor[tuple(index)]

    def inner(leaves: list[Tensor]) -> list[Tensor]:
        length = leaves[0].shape[axis]
        if length < 2:
            return leaves
        pairs = operator(
            [part(each, 0, -1, 2) for each in leaves], [part(each, 1, None, 2) for each in leaves]
        )
        odd = inner(list(pairs))
        short = [part(each, 0, -1) for each in odd] if length % 2 == 0 else odd
        even = operator(short, [part(each, 2, None, 2) for each in leaves])
        even = [torch.cat([part(each, 0, 1), more], axis) for each, more in zip(leaves, even, strict=True)]
        return [interleaved(one, other) for one, other in zip(even, odd, strict=True)]

    def interleaved(one: Tensor, other: Tensor) -> Tensor:
        size = list(one.shape)
        size[axis] += other.shape[axis]
        order = torch.cat([torch.arange(0, size[axis], 2), torch.arange(1, size[axis], 2)])
        return torch.cat([one, other], axis).index_select(axis, order.argsort())

    if reverse:
        leaves = [each.flip(axis) for each in leaves]
    found = inner(leaves)
    return tuple(each.flip(axis) for each in found) if reverse else tuple(found)


def doubling(decay: Tensor, added: Tensor) -> Tensor:
    """The linear scan along axis 1 in log2(l) passes, as a plain function."""
    span = 1
    while span < added.shape[1]:
        ahead = torch.zeros_like(added[:, :span])
        added = added + decay * torch.cat([ahead, added[:, :-span]], 1)
        decay = decay * torch.cat([torch.ones_like(ahead), decay[:, :-span]], 1)
        span *= 2
    return added


def step_by_step(decay: Tensor, added: Tensor) -> Tensor:
    """The same as a loop."""
    state, states = torch.zeros_like(added[:, 0]), []
    for step in range(added.shape[1]):
        state = decay[:, step] * state + added[:, step]
        states.append(state)
    return torch.stack(states, 1)


class Gated(nn.Module):
    """A gated linear recurrence, run by one of the functions above; x is (b, l, d)."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], d: int = 12) -> None:
        super().__init__()
        self.run = run
        self.proj = nn.Linear(d, 2 * d)

    def forward(self, x: Tensor) -> Tensor:
        decay, added = self.proj(x).chunk(2, -1)
        return self.run(decay.sigmoid(), added) + x


def forwards(decay: Tensor, added: Tensor) -> Tensor:
    return tree_scan(linear, (decay, added), axis=1)[1]


def backwards(decay: Tensor, added: Tensor) -> Tensor:
    return tree_scan(linear, [decay, added], axis=1, reverse=True)[1]


def running_maximum(decay: Tensor, added: Tensor) -> Tensor:
    return tree_scan(lambda one, other: [torch.maximum(one[0], other[0])], (decay * added,), 1)[0]


def passes(decay: Tensor, added: Tensor) -> Tensor:
    return doubling(decay, added)
