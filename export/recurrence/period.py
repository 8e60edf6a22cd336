"""Where a traced graph repeats itself: runs of nodes that equal those one period later, in trace order.

Equal means: same operator, same nesting of arguments, same shape and dtype. Whether such a run is a loop depends on
what its nodes read (`match_iterations`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from moe_export.export.recurrence.operand import is_size, is_view, layout
from moe_export.export.sizes import expression_of

LEAST_ITERATIONS = 3  # two iterations suggest a rule, the third confirms it


@dataclass(frozen=True)
class Run:
    """Nodes `start` to `stop` (exclusive) repeat after `period` nodes."""

    start: int
    stop: int
    period: int


def sequence(graph: fx.Graph) -> list[fx.Node]:
    """The computations of a graph in trace order: no inputs, views or sizes."""
    return [
        node for node in graph.nodes if node.op == "call_function" and not is_view(node) and not is_size(node)
    ]


def tokens(nodes: Sequence[fx.Node]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(nodes,) int64: equal numbers for nodes that could be the same step of two iterations."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(_token(node), len(numbers)) for node in nodes], dtype=np.int64)


def signature(nodes: Sequence[fx.Node]) -> tuple[Any, ...]:
    """What distinguishes one body from another in any trace of the same model: operators and nesting, but no sizes."""
    return tuple((node.target, layout(node.args), layout(node.kwargs)) for node in nodes)


def _token(node: fx.Node) -> Any:
    shape: Any = None
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        # A list that grows by `cat` has a different size in every iteration.
        growing = node.target is torch.ops.aten.cat.default
        shape = (None if growing else tuple(map(expression_of, value.shape)), value.dtype)
    return node.target, layout(node.args), layout(node.kwargs), shape


def runs(tokens: np.ndarray[Any, np.dtype[np.int64]], period: int) -> Iterator[Run]:
    """The maximal runs of this period that are at least three iterations long. A negative token equals nothing."""
    if len(tokens) < LEAST_ITERATIONS * period:
        return
    equal = (tokens[period:] == tokens[:-period]) & (tokens[period:] >= 0)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], equal, [False])).astype(np.int8)))
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if stop - start >= (LEAST_ITERATIONS - 1) * period:
            yield Run(start, stop + period, period)
