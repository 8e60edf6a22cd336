"""How many experts a gate chooses from, seen from the indices that it gave."""

from __future__ import annotations

import operator

import torch
from torch import fx

from moe_export.export.choice import Choice, as_choice

_aten = torch.ops.aten

# What hands the chosen indices on.
_CARRIERS = {
    _aten._to_copy.default, _aten.to.dtype, _aten.clone.default, _aten.view.default, _aten.reshape.default,
    _aten.flatten.using_ints, _aten.alias.default, _aten.detach.default, _aten.squeeze.dim, _aten.unsqueeze.default,
    _aten.unbind.int, _aten.select.int, _aten.slice.Tensor,
}  # fmt: skip


def experts_of(indices: fx.Node | None) -> int | None:
    """How many experts there are to choose from, by the choice that indices come from."""
    while indices is not None:
        choice = as_choice(indices) or _choice_of(indices)
        if choice is not None:
            return choice.experts
        known = indices.target in _CARRIERS and isinstance(indices.args[0], fx.Node)
        indices = indices.args[0] if known else None  # type: ignore[assignment]
    return None


def _choice_of(node: fx.Node) -> Choice | None:
    """The choice whose indices a value is."""
    if node.target is not operator.getitem:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    choice = as_choice(source)
    return choice if choice is not None and choice.indices is node else None
