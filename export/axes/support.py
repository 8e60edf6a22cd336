"""Matrices (N, E) that are 0 wherever an expert was not chosen: gates as code that dispatches by them makes them.

    zeros.scatter(1, idx, weights)        softmax(full(-inf).scatter(1, idx, scores))
    scores * mask        (one_hot(idx) * weights[..., None]).sum(1)        where(mask, scores, 0.0)

Letters: N tokens, k slots, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.one_hot import one_hot_mask_of
from moe_export.export.axes.operators import BOTH, CASTS, FULL, SCATTERS, SOFTMAXES, ZEROS
from moe_export.export.axes.shapes import arguments, named_axes, rank_of, shape_of
from moe_export.export.sizes import same_shape

_aten = torch.ops.aten

_FROM_BELOW = {_aten.softmax.int, _aten._softmax.default, _aten.sigmoid.default, _aten.exp.default}
_NEGATIONS = {_aten.logical_not.default, _aten.bitwise_not.default}


def support_of(matrix: fx.Node) -> fx.Node | None:
    """The chosen experts (N, k) outside of which a matrix (N, E) is 0; None if none are known."""
    found = _outside(matrix)
    return found[0] if found is not None and found[1] == 0 else None


def supports_in(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The same of every such matrix of a graph, in graph order."""
    known: dict[object, Outside] = {}
    for node in graph.nodes:
        found = _outside(node, known.get)
        if found is not None:
            known[node] = found
    return {
        node: chosen for node, (chosen, value) in known.items() if value == 0 and isinstance(node, fx.Node)
    }


def scattered_values(matrix: fx.Node) -> fx.Node | None:
    """The weights (N, k) of a matrix that is `zeros.scatter(1, idx, weights)`; None if it is no such."""
    while matrix.target in CASTS:
        if shape_of(matrix) and matrix.meta["val"].dtype != arguments(matrix)[0].meta["val"].dtype:
            return None
        matrix = arguments(matrix)[0]
    if matrix.target is not _aten.scatter.src or _outside(matrix) is None:
        return None
    _, _, index, values = arguments(matrix)[:4]
    found: fx.Node = values
    return found if same_shape(shape_of(values), shape_of(index)) else None


Outside = tuple[fx.Node, float]
"""The chosen experts (N, k) or (N,), and what a matrix holds everywhere else."""
Look = Callable[[Any], "Outside | None"]
"""How a rule asks the same of a node's arguments."""


def _outside(node: object, look: Look | None = None) -> Outside | None:
    if not isinstance(node, fx.Node) or node.op != "call_function" or rank_of(node) != 2:
        return None
    one_hot = one_hot_mask_of(node)
    if one_hot is not None and one_hot.axes == ("token", "expert"):
        same_tokens = same_shape(shape_of(one_hot.indices)[:1], shape_of(node)[:1])
        return (one_hot.indices, 0.0) if same_tokens else None
    rule = _RULES.get(node.target)
    return rule(node, look or _outside) if rule is not None else None


def _scattered(node: fx.Node, look: Look) -> Outside | None:
    """`zeros.scatter(1, idx, weights)`."""
    base, _, index = arguments(node)[:3]
    start = constant_of(base)
    return (index, start) if start is not None and named_axes(node) == (1,) and rank_of(index) == 2 else None


def _unchanged(node: fx.Node, look: Look) -> Outside | None:
    return look(arguments(node)[0])


def _from_below(node: fx.Node, look: Look) -> Outside | None:
    """The softmax along the experts, the sigmoid or the exponential of -inf is 0."""
    found = look(arguments(node)[0])
    along_experts = node.target not in SOFTMAXES or named_axes(node) == (1,)
    return (found[0], 0.0) if found is not None and found[1] == -math.inf and along_experts else None


def _compared(node: fx.Node, look: Look) -> Outside | None:
    source, number = arguments(node)
    return _if_zero(look(source)) if number == 0 else None


def _product(node: fx.Node, look: Look) -> Outside | None:
    first, second = arguments(node)
    return _if_zero(look(first)) or _if_zero(look(second))


def _quotient(node: fx.Node, look: Look) -> Outside | None:
    return _if_zero(look(arguments(node)[0]))


def _where(node: fx.Node, look: Look) -> Outside | None:
    mask, _, filling = arguments(node)
    return _filled(mask, filling, look)


def _masked_fill(node: fx.Node, look: Look) -> Outside | None:
    _, mask, filling = arguments(node)
    return _filled(arguments(mask)[0], filling, look) if mask.target in _NEGATIONS else None


def _if_zero(found: Outside | None) -> Outside | None:
    return found if found is not None and found[1] == 0 else None


def _filled(mask: object, filling: object, look: Look) -> Outside | None:
    """`where(mask, ..., filling)`."""
    chosen, value = _if_zero(look(mask)), constant_of(filling)
    return (chosen[0], value) if chosen is not None and value is not None else None


def constant_of(value: object) -> float | None:
    """The one number of which a value is full; None if there are several."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if value.target in ZEROS:
        return 0.0
    if value.target in FULL:
        return constant_of(arguments(value)[FULL[value.target]])
    if value.target in CASTS:
        return constant_of(arguments(value)[0])
    return None


def _over_slots(node: fx.Node, look: Look) -> Outside | None:
    """`(one_hot(idx) * weights[..., None]).sum(1)`."""
    source = arguments(node)[0]
    if rank_of(source) != 3 or named_axes(node) != (1,):
        return None
    factors = source.all_input_nodes if source.target is _aten.mul.Tensor else [source]
    for factor in factors:
        one_hot = one_hot_mask_of(factor)
        if one_hot is None or one_hot.axes != ("token", "slot", "expert"):
            continue
        if same_shape(shape_of(one_hot.indices), shape_of(factor)[:2]):
            return one_hot.indices, 0.0
    return None


_RULES: Mapping[Any, Callable[[fx.Node, Look], Outside | None]] = {
    **dict.fromkeys(SCATTERS, _scattered),
    **dict.fromkeys(CASTS, _unchanged),
    **dict.fromkeys(_FROM_BELOW, _from_below),
    **dict.fromkeys((_aten.gt.Scalar, _aten.ne.Scalar), _compared),
    **dict.fromkeys(BOTH, _product),
    **dict.fromkeys((_aten.where.self, _aten.where.ScalarOther), _where),
    _aten.div.Tensor: _quotient,
    _aten.masked_fill.Scalar: _masked_fill,
    _aten.sum.dim_IntList: _over_slots,
}

_NEVER_BELOW = {
    _aten.softmax.int, _aten._softmax.default, _aten.sigmoid.default, _aten.exp.default, _aten.relu.default,
    _aten.abs.default, _aten.softplus.default, _aten.square.default, _aten.one_hot.default,
}  # fmt: skip
_KEEPS_SIGN = {
    *CASTS, _aten.slice.Tensor, _aten.select.int, _aten.gather.default, _aten.index.Tensor, _aten.sum.dim_IntList,
    _aten.amax.default, _aten.mean.dim, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.view.default,
    _aten.reshape.default, _aten.expand.default, _aten.add.Tensor, _aten.mul.Tensor, _aten.div.Tensor,
    *SCATTERS, _aten.cat.default, _aten.stack.default, _aten.where.self, _aten.permute.default,
    _aten.transpose.int, _aten.t.default,
}  # fmt: skip


def is_never_negative(value: Any) -> bool:
    """Whether no entry of a value is below 0, by the operators that it comes from."""
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float)) and value >= 0
    args, whole = arguments(value), value.meta.get("val")
    if value.target in _NEVER_BELOW or (isinstance(whole, torch.Tensor) and whole.dtype is torch.bool):
        return True
    if getattr(value.target, "__name__", "") == "getitem":
        chooses = args[0].target is _aten.topk.default and args[1] == 0
        return chooses and is_never_negative(arguments(args[0])[0])
    if value.target in (_aten.clamp.default, _aten.clamp_min.default):
        return isinstance(args[1], (int, float)) and args[1] >= 0
    constant = constant_of(value)
    if constant is not None:
        return constant >= 0
    if value.target not in _KEEPS_SIGN or value.kwargs.get("alpha", 1) != 1:
        return False
    return all(is_never_negative(each) for each in _entries(value))


def _entries(node: fx.Node) -> list[Any]:
    """The arguments of an operator that its result's entries come from."""
    args = arguments(node)
    if node.target in SCATTERS:
        return [args[0], args[3]]
    if node.target in (_aten.add.Tensor, _aten.mul.Tensor, _aten.div.Tensor):
        return list(args[:2])
    if node.target is _aten.where.self:
        return list(args[1:3])
    return list(args[0]) if node.target in (_aten.cat.default, _aten.stack.default) else [args[0]]
