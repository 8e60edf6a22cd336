"""Which token went to which expert on given inputs, as plain numbers: what a routing picture shows.

Letters: N tokens, k choices of a token, e experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from moe_export.export.frontend.subject import Subject
from moe_export.export.gates.gate import values_of
from moe_export.export.gates.routing import Routing, find_routings
from moe_export.export.tracing.trace import trace


@dataclass(frozen=True)
class Dispatch:
    """The routing of one gate.

    Attributes:
        path: Path of the gate's module.
        line: `file:line` of the choice.
        experts: e.
        indices: (N, k) int64, the chosen experts; first choice first.
        weights: (N, k) floats, or None where the gate gives none.
    """

    path: str
    line: str | None
    experts: int
    indices: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        bad = self.indices[(self.indices < 0) | (self.indices >= self.experts)]
        if bad.size:
            raise ValueError(f"expert {bad.flat[0]} of a gate over {self.experts} experts")

    @property
    def loads(self) -> np.ndarray:
        """(e,) int64, how many tokens each expert got."""
        return np.bincount(self.indices.reshape(-1), minlength=self.experts)

    @property
    def slots(self) -> np.ndarray:
        """(N, k) int64, the slot that each token takes at its expert, counted from 0.

        First choices take their slots before second ones, earlier tokens before later ones, as in GShard.
        """
        flat = self.indices.T.reshape(-1)
        order = np.argsort(flat, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.loads)[:-1]])
        places = np.empty_like(flat)
        places[order] = np.arange(flat.size) - starts[flat[order]]
        return places.reshape(self.indices.T.shape).T


def find_dispatches(subject: Subject) -> tuple[Dispatch, ...]:
    """Run a model on its example inputs and read off where every gate sent every token.

    Raises:
        UsageError: The model's weights were left in files because they are too large to load at once.
    """
    subject.require_weights()
    traced = trace(subject)
    routings = [routing for routing in find_routings(traced) if routing.choices[0].tokens is None]
    nodes = tuple(dict.fromkeys(node for routing in routings for node in routing.outputs))
    values = (
        dict(zip(nodes, values_of(traced, nodes), strict=True)) if nodes else {}
    )  # one run for all of them
    return tuple(_dispatch(routing, values) for routing in routings)


def _dispatch(routing: Routing, known: Mapping[fx.Node, torch.Tensor]) -> Dispatch:
    nodes = tuple(choice.indices for choice in routing.choices)
    values = [known[node] for node in (*nodes, *routing.weights)]
    slots = [choice.slots for choice in routing.choices]
    chosen = [value.numpy().reshape(-1, k) for value, k in zip(values, slots, strict=False)]
    indices = np.concatenate(chosen, axis=1)
    found = [value.float().numpy() for value in values[len(nodes) :]]
    weights = None
    if sum(weight.size for weight in found) == indices.size:
        weights = np.concatenate([weight.reshape(len(indices), -1) for weight in found], axis=1)
    return Dispatch(routing.path, routing.line, routing.experts, indices, weights)
