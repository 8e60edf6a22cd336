"""Expert-choice routing (arXiv:2202.09368): every expert chooses its tokens, by `topk` along the tokens.

Recognised by what it does: scores of a fixed number of experts for any number of tokens, a `topk` along the tokens,
and indices by which rows of tokens are then gathered, marked in a one-hot mask, or scattered back.

Letters: n tokens, e experts, c tokens an expert chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_export.export.axes.choice import CARRIERS, Choice, is_part
from moe_export.export.gates.region import ancestors
from moe_export.export.sizes import fixed

_aten = torch.ops.aten

_PICKS: dict[Any, int] = {
    _aten.index.Tensor: 1, _aten.index_select.default: 2, _aten.gather.default: 2, _aten.index_put.default: 1,
    _aten.index_add.default: 2, _aten.scatter_add.default: 2, _aten.scatter.src: 2, _aten.scatter.value: 2,
    _aten.scatter_reduce.two: 2, _aten.one_hot.default: 0,
}  # fmt: skip
"""Operators that use row numbers, and the position of the argument that holds them."""


def as_token_choice(node: fx.Node) -> Choice | None:
    """A `topk` along the tokens, with their axis; None for anything else."""
    if node.target is not _aten.topk.default:
        return None
    scores = node.args[0]
    assert isinstance(scores, fx.Node)
    value = scores.meta["val"]
    parts = {user.args[1]: user for user in node.users if is_part(user)}
    if value.dim() < 2 or not value.dtype.is_floating_point or 1 not in parts:
        return None
    given: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)
    axis = int(given) % value.dim()
    others = [fixed(size) for place, size in enumerate(value.shape) if place != axis]
    experts = [size for size in others if size not in (None, 1)]
    if fixed(value.shape[axis]) is not None or len(experts) != 1 or not _is_routed(scores):
        return None
    if not _picks_rows(parts[1]):
        return None
    return Choice(node, scores, parts[1], parts.get(0), experts[0], tokens=axis)


def _is_routed(scores: fx.Node) -> bool:
    """Whether scores are computed from tokens by a router: a product with weights."""
    products = {
        _aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default,
        _aten.einsum.default,
    }  # fmt: skip
    return any(node.target in products for node in ancestors([scores]))


def _picks_rows(indices: fx.Node) -> bool:
    stack, seen = [indices], {indices}
    while stack:
        node = stack.pop()
        for user in node.users:
            place = _PICKS.get(user.target)
            if place is not None and _takes(user.args[place], node):
                return True
            if user.target is _aten.eq.Tensor:  # `idx[..., None] == arange(n)`: a one-hot mask
                return True
            if user.target in CARRIERS and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _takes(argument: object, node: fx.Node) -> bool:
    return node in argument if isinstance(argument, (list, tuple)) else argument is node
