"""One operator that chooses among experts: `topk`, `argmax` or `max` along the last dimension.

Letters: e experts, k choices a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from moe_export.export.sizes import fixed

_aten = torch.ops.aten

CARRIERS = {
    _aten.view.default, _aten.reshape.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.default,
    _aten.flatten.using_ints, _aten._to_copy.default, _aten.to.dtype, _aten.clone.default, _aten.expand.default,
    _aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.contiguous.default, _aten.detach.default,
    _aten.alias.default, _aten.slice.Tensor, _aten.select.int,
}  # fmt: skip
"""Operators that only rearrange, select or cast chosen indices, or one-hot masks made from them."""


@dataclass(frozen=True)
class Choice:
    """One operator that chooses: `topk`, `argmax` or `max` along the experts.

    Attributes:
        scores: (..., e) floats, the scores that it chooses by.
        indices: (..., k) int64 from `topk`, (...) from `argmax` and `max`.
        values: The chosen scores, of the indices' shape; None where the operator does not return them.
        experts: e.
        tokens: The axis of the tokens, where experts choose their tokens (`gates/tokens`); None where tokens choose.
    """

    operator: fx.Node
    scores: fx.Node
    indices: fx.Node
    values: fx.Node | None
    experts: int
    tokens: int | None = None

    @property
    def slots(self) -> int:
        """Choices a token: k for `topk`, 1 for the others."""
        if self.operator.target is not _aten.topk.default:
            return 1
        return int(self.indices.meta["val"].shape[-1])


_CHOOSES = {_aten.topk.default, _aten.argmax.default, _aten.max.dim}


def may_choose(graph: fx.Graph) -> bool:
    """Whether a graph has any operator that `as_choice` might accept."""
    return any(node.target in _CHOOSES for node in graph.nodes)


def as_choice(node: fx.Node) -> Choice | None:
    """An operator as a choice among experts; None unless it chooses along the last, fixed axis of float scores."""
    if node.op != "call_function" or node.target not in _CHOOSES:
        return None
    scores = node.args[0]
    assert isinstance(scores, fx.Node)
    value = scores.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or value.dim() < 2:
        return None
    argument = 2 if node.target is _aten.topk.default else 1
    axis = node.args[argument] if len(node.args) > argument else node.kwargs.get("dim", -1)
    experts = fixed(value.shape[-1])
    if not isinstance(axis, int) or axis % value.dim() != value.dim() - 1 or experts is None:
        return None
    parts = {
        user.args[1]: user for user in node.users if user.target is not _aten.argmax.default and is_part(user)
    }
    if node.target is _aten.argmax.default:
        return Choice(node, scores, node, None, experts)
    return Choice(node, scores, parts[1], parts.get(0), experts) if 1 in parts else None


def is_part(node: fx.Node) -> bool:
    """Whether a node is the `getitem` that takes one result of an operator with several."""
    return getattr(node.target, "__name__", "") == "getitem"
