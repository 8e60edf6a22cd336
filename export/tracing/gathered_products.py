"""Products of weights that were looked up for each pair of a token and an expert, without a copy for each pair.

    w = stack[e, k, n][ids[s]]         a copy of an expert's matrix for each of s pairs: gigabytes
    y[s, m, n] = x[s, m, k] w[s, k, n]

    y[ids == e] = x[ids == e] stack[e]    the same, one product for each expert that was chosen

A trace has the first form, because it holds for any routing. What runs a trace to compare it takes the second.

Letters: e experts, s pairs, m rows of a pair (1), k and n sizes of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Gathered:
    """Matrices of a stack, one for each pair, that are not copied yet.

    Attributes:
        stack: (e, k, n).
        ids: (s,), which of them.
    """

    stack: Tensor
    ids: Tensor


def only_multiplied(node: fx.Node) -> bool:
    """Whether a node looks up entries of a tensor, and nothing but products of matrices takes them."""
    if node.target is not aten.index.Tensor or not node.users:
        return False
    indices: Any = node.args[1]
    return len(indices) == 1 and all(
        user.target is aten.bmm.default and (user.args[0] is node) != (user.args[1] is node)
        for user in node.users
    )


def looked_up(stack: Tensor, ids: Tensor) -> Tensor | Gathered:
    """What a node of `only_multiplied` gives: matrices not copied, if it looks up fewer than there are pairs."""
    listed = ids.dim() == 1 and ids.dtype is not torch.bool
    if listed and stack.dim() == 3 and len(ids) > len(stack):
        return Gathered(stack, ids % len(stack))  # a negative one counts from the end
    return aten.index.Tensor(stack, [ids])  # type: ignore[no-any-return]


def product(left: Tensor | Gathered, right: Tensor | Gathered) -> Tensor:
    """`bmm` where one of both may be `Gathered`."""
    if isinstance(left, Gathered):
        assert isinstance(right, Tensor)
        return _by_expert(left, right, "kn,snm->skm")
    if isinstance(right, Gathered):
        return _by_expert(right, left, "kn,smk->smn")
    return torch.bmm(left, right)


def _by_expert(gathered: Gathered, other: Tensor, equation: str) -> Tensor:
    found: Tensor | None = None
    for expert in sorted(set(gathered.ids.tolist())):
        rows = (gathered.ids == expert).nonzero().flatten()
        part = torch.einsum(equation, gathered.stack[expert], other[rows])
        found = part.new_empty(len(other), *part.shape[1:]) if found is None else found
        found[rows] = part
    assert found is not None  # there are more pairs than experts
    return found
