"""Decompositions of operators that the exporter does not know into those that it does. One rule an operator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from moe_export.export.onnx.before import Before, arguments
from moe_export.export.onnx.decompositions_logs import LOG_RULES
from moe_export.export.onnx.decompositions_matrices import MATRIX_RULES
from moe_export.export.onnx.decompositions_numbers import NUMBER_RULES
from moe_export.export.onnx.decompositions_order import ORDER_RULES
from moe_export.export.onnx.decompositions_windows import WINDOW_RULES
from moe_export.export.sizes import same_shape
from moe_export.export.tracing.programs import copied_module, name_outputs, with_module
from moe_export.export.tracing.slices import carry_constants

_aten = torch.ops.aten


_NARROW = (torch.float16, torch.bfloat16)
_REDUCTIONS = (
    _aten.sum.default,
    _aten.sum.dim_IntList,
    _aten.nansum.default,
    _aten.prod.default,
    _aten.prod.dim_int,
    _aten.cumsum.default,
)


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """A program with its operators in the forms that the exporter knows; the given one stays as it was."""
    copied = with_module(program, copied_module(program))
    decompose(copied.graph)  # numbers that it writes have no example value, which a new program would ask for
    name_outputs(copied.graph_signature, copied.graph)
    return copied


def decompose(graph: fx.Graph) -> None:
    """Decompose the nodes of a traced graph, in place."""
    for node in list(graph.nodes):
        rule = _RULES.get(node.target)
        if rule is not None:
            rule(node)


def _all_axes(node: fx.Node) -> None:
    """`x.amax()` → `x.amax((0, 1, 2))`; of half precision, which the exporter widens, cast back."""
    value, result = node.args[0], node.meta.get("val")
    if isinstance(result, torch.Tensor) and result.dtype in _NARROW:
        with node.graph.inserting_after(node):
            cast = node.graph.call_function(_aten._to_copy.default, (node,), {"dtype": result.dtype})
        cast.meta = dict(node.meta)
        node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    if isinstance(value, fx.Node) and not (node.args[1:] and node.args[1]) and not node.kwargs.get("dim"):
        keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        node.args = (value, list(range(value.meta["val"].dim())), keepdim)
        node.kwargs = {}


def _stable_sort(node: fx.Node) -> None:
    """`sort(stable=True)` → `sort`: ONNX's TopK, which it becomes, puts the lower index first among equals."""
    given = dict(node.kwargs)
    node.target = _aten.sort.default if node.target is _aten.sort.stable else _aten.argsort.default
    node.args = (node.args[0], given.get("dim", -1), given.get("descending", False))
    node.kwargs = {}


def _squeeze(node: fx.Node) -> None:
    """`x.squeeze(1)` of an axis that is not of size 1 → x: the exporter leaves the axis out whatever its size is."""
    value = node.args[0]
    axes = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    if isinstance(value, fx.Node) and "val" in node.meta:
        before, after = value.meta["val"], node.meta["val"]
        gone = (
            [axis for axis in axes if isinstance(axis, int) and _is_one(before.shape[axis])]
            if before.dim()
            else []
        )
        if before.dim() - after.dim() == len(gone) < len(axes):
            node.target, node.args = (
                (_aten.squeeze.dims, (value, gone)) if gone else (_aten.alias.default, (value,))
            )


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


def _masked_select(node: fx.Node) -> None:
    """`x.masked_select(mask)` → `x[mask]`, both of one shape."""
    pair = [each for each in node.args if isinstance(each, fx.Node)]
    if len(pair) == 2 and all("val" in each.meta for each in pair):
        value, mask = (each.meta["val"] for each in pair)
        if tuple(value.shape) == tuple(mask.shape):
            node.target, node.args = _aten.index.Tensor, (pair[0], [pair[1]])


def _wide_indices(node: fx.Node) -> None:
    """`x[i]` with i of int32 → with i of int64, all that GatherND and ScatterND take."""

    def widened(index: fx.node.Argument) -> fx.node.Argument:
        narrow = isinstance(index, fx.Node) and index.meta["val"].dtype in (
            torch.int8,
            torch.int16,
            torch.int32,
        )
        return Before(node)(_aten._to_copy.default, index, dtype=torch.int64) if narrow else index

    value, indices, *rest = node.args
    node.args = (value, [widened(index) for index in indices], *rest)  # type: ignore[union-attr]


_MADE_OF = "made_of"
_CHOSEN = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8)
"""What ONNX Runtime's `Where` takes on the CPU (1.31)."""


def _put(node: fx.Node) -> None:
    """`x[mask] = 0` → `where(mask, 0, x)`, and `x[mask] = y[mask]` → `where(mask, y, x)`.

    The exporter looks for the places where the mask is true, whose number depends on values (NonZero), and writes
    there. What is written must be the same for all of them, or stand at the same places in another tensor.
    """
    value, indices, written, *accumulate = node.args
    assert isinstance(indices, list | tuple)
    places = [place for place, index in enumerate(indices) if index is not None]
    mask = indices[places[0]] if len(places) == 1 else None
    nodes = isinstance(value, fx.Node) and isinstance(mask, fx.Node) and isinstance(written, fx.Node)
    if not nodes or any(accumulate) or not all("val" in each.meta for each in node.all_input_nodes):
        _wide_indices(node)
        return
    assert isinstance(value, fx.Node)
    assert isinstance(mask, fx.Node)
    assert isinstance(written, fx.Node)
    behind = value.meta["val"].dim() - places[0] - mask.meta["val"].dim()
    taken = _written_by_mask(written, value, indices, behind)
    chosen = value.meta["val"].dtype in (*_CHOSEN, torch.bool)
    if mask.meta["val"].dtype is not torch.bool or taken is None or not chosen:
        _wide_indices(node)
        return
    for _ in range(behind):
        mask = Before(node)(_aten.unsqueeze.default, mask, -1)
    node.target, node.args = _aten.where.self, (mask, taken, value)
    _choose_booleans(node)


def _choose_booleans(node: fx.Node) -> None:
    """`where(mask, a, b)` of booleans → `mask & a | ~mask & b`: ONNX Runtime's CPU has no `Where` for them (1.31)."""
    mask, taken, left = node.args
    if node.target in (_aten.masked_fill.Scalar, _aten.masked_fill.Tensor):
        left, mask, taken = node.args
    result = node.meta.get("val")
    known = isinstance(mask, fx.Node) and isinstance(result, torch.Tensor) and result.dtype is torch.bool
    if not known or mask.meta["val"].dtype is not torch.bool:  # type: ignore[union-attr]
        return
    write = Before(node)
    if not isinstance(taken, fx.Node) and not isinstance(left, fx.Node):
        left = write(_aten.full.default, [], bool(left), dtype=torch.bool)
    if not isinstance(taken, fx.Node):
        joined = (mask, left) if taken else (write(_aten.logical_not.default, mask), left)
        node.target = _aten.logical_or.default if taken else _aten.logical_and.default
    elif not isinstance(left, fx.Node):
        joined = (write(_aten.logical_not.default, mask), taken) if left else (mask, taken)
        node.target = _aten.logical_or.default if left else _aten.logical_and.default
    else:
        unmasked = write(_aten.logical_and.default, write(_aten.logical_not.default, mask), left)
        joined = (write(_aten.logical_and.default, mask, taken), unmasked)
        node.target = _aten.logical_or.default
    node.args, node.kwargs = joined, {}


def _written_by_mask(
    written: fx.Node, value: fx.Node, indices: Sequence[fx.node.Argument], behind: int
) -> fx.Node | None:
    """What stands where a mask is true, of the shape of the whole tensor or broadcast to it; None if it is neither."""
    found = written.meta["val"]
    if found.dim() <= behind:
        return written
    if found.dim() == 1 and _is_one(found.shape[0]):
        return written
    other = written.args[0] if written.target is _aten.index.Tensor else None
    if isinstance(other, fx.Node) and list(written.args[1]) == list(indices):  # type: ignore[arg-type]
        return other if same_shape(other.meta["val"].shape, value.meta["val"].shape) else None
    return None


def _attention(node: fx.Node) -> None:
    """`attention(q, k, v, mask)` → `where(mask.any(-1), attention(q, k, v, where(mask, 0, -inf)), 0)`.

    A query that may look at nothing, as a padded token, gets zeros from PyTorch. The exporter adds the least finite
    number to what is masked, so that such a query gets the mean of all values. What is made of a mask is made once.
    The zeros of the result are another constant than those of the mask: OpenVINO 2026.4 refuses one that both share.
    """
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    result = node.meta.get("val")
    if not isinstance(mask, fx.Node) or not isinstance(result, torch.Tensor):
        return
    if mask.meta["val"].dtype is not torch.bool:
        return
    zero = _made_of(mask, _aten.full.default, [], 0.0, dtype=result.dtype)
    never = _made_of(mask, _aten.full.default, [], -torch.inf, dtype=result.dtype)
    added = _made_of(mask, _aten.where.self, mask, zero, never)
    looks = _made_of(mask, _aten.any.dim, mask, -1, True)
    query, key, value, *rest = node.args
    kwargs = {name: given for name, given in node.kwargs.items() if name != "attn_mask"}
    attended = Before(node)(
        _aten.scaled_dot_product_attention.default, query, key, value, added, *rest[1:], **kwargs
    )
    nothing = _made_of(mask, _aten.full.default, [1], 0.0, dtype=result.dtype)
    node.target, node.args, node.kwargs = _aten.where.self, (looks, attended, nothing), {}


def _made_of(source: fx.Node, target: Callable[..., Any], *args: fx.node.Argument, **kwargs: Any) -> fx.Node:
    """A node behind the one that it is made of, and those made of it before; the same one when asked again."""
    place = source
    while place.next.meta.get(_MADE_OF) is source:
        place = place.next
        if (place.target, place.args, place.kwargs) == (target, args, kwargs):
            return place
    with source.graph.inserting_after(place):
        made = source.graph.call_function(target, args, kwargs)
    made.meta.update(
        {**source.meta, "val": target(*fx.map_arg(args, lambda each: each.meta["val"]), **kwargs)}
    )
    made.meta[_MADE_OF] = source
    return made


def _kept_narrow(node: fx.Node) -> None:
    """`x.half().sum(1)` → `x.half().sum(1, dtype=float16)`: the exporter sums in float32 and leaves the result so."""
    value, result = node.args[0], node.meta.get("val")
    if not isinstance(result, torch.Tensor) or result.dtype not in _NARROW:
        return
    if isinstance(value, fx.Node) and node.kwargs.get("dtype") is None:
        node.kwargs = {**node.kwargs, "dtype": result.dtype}


def _scattered_mean(node: fx.Node) -> None:
    """`x.scatter_reduce(dim, index, rows, "mean")` → the sum over the count: the exporter writes the last row there.

    x itself counts as one row wherever rows arrive, unless `include_self=False`. Where none arrives, x stays.
    """
    value, dim, index, rows, how = node.args
    if how != "mean" or not node.meta["val"].is_floating_point():
        return
    place = {"include_self": node.kwargs.get("include_self", True)}
    one = _like(node, value, 1.0)
    total = Before(node)(_aten.scatter_reduce.two, value, dim, index, rows, "sum", **place)
    count = Before(node)(_aten.scatter_reduce.two, one, dim, index, _like(node, rows, 1.0), "sum", **place)
    node.target, node.args, node.kwargs = _aten.div.Tensor, (total, count), {}


def _like(node: fx.Node, value: fx.node.Argument, number: float) -> fx.Node:
    """A tensor of one number, of a value's shape, in front of a node."""
    return Before(node)(_aten.full_like.default, value, number)


def _without_underscores(node: fx.Node) -> None:
    """`a & b` → `bitwise_and(a, b)`: by the first name, the exporter would trace the whole program once more for it."""
    node.target = _PLAIN_NAMES[node.target]


def _repeated_by_size(node: fx.Node) -> None:
    """`x.repeat_interleave(n, dim)` of a size n → `x.unsqueeze(dim + 1).expand(.., n, ..).flatten(dim, dim + 1)`.

    The exporter takes n for a number that it knows. It knows those that are written in the model.
    """
    value, count, axis, *_ = arguments(node, None, None, None)
    axis = node.kwargs.get("dim", axis)
    if not isinstance(count, fx.Node) or not isinstance(value, fx.Node):
        return
    write = Before(node)
    if axis is None:
        value, axis = write(_aten.reshape.default, value, [-1]), 0
    rank = value.meta["val"].dim()
    axis %= rank
    apart = write(_aten.unsqueeze.default, value, axis + 1)
    sizes = [-1] * (axis + 1) + [count] + [-1] * (rank - axis - 1)
    each = write(_aten.expand.default, apart, sizes)
    node.target, node.args, node.kwargs = _aten.flatten.using_ints, (each, axis, axis + 1), {}


def _difference(node: fx.Node) -> None:
    """`x.diff()` → `x[1:] - x[:-1]`, for the same reason; what is put in front or behind is joined to x first."""
    given = [*node.args, *(1, -1, None, None)[len(node.args) - 1 :]]
    value, times, axis, ends = given[0], given[1], given[2], given[3:]
    if times != 1 or node.kwargs or node.meta["val"].dtype == torch.bool:
        return
    write = Before(node)
    joined = [each for each in (ends[0], value, ends[1]) if each is not None]
    whole = write(_aten.cat.default, joined, axis) if len(joined) > 1 else value
    after = write(_aten.slice.Tensor, whole, axis, 1, sys.maxsize)
    before = write(_aten.slice.Tensor, whole, axis, 0, -1)
    node.target, node.args = _aten.sub.Tensor, (after, before)


# What a score goes through on its way to the choice: biases, masks, groups.
_KEEPS_SCORES = {
    _aten.add.Tensor, _aten.add.Scalar, _aten.sub.Tensor, _aten.view.default, _aten.reshape.default,
    _aten.squeeze.dim, _aten.unsqueeze.default, _aten.expand.default, _aten.clone.default, _aten.transpose.int,
    _aten.permute.default, _aten._to_copy.default, _aten.masked_fill.Scalar, _aten.masked_fill.Tensor,
    _aten.where.self, _aten.where.ScalarOther,
}  # fmt: skip
_CHOOSES = {_aten.topk.default, _aten.argmax.default, _aten.max.dim, _aten.sort.default}


def _exact_scores(node: fx.Node) -> None:
    """`sigmoid(x)`, by which experts are chosen → `1 / (1 + exp(-x))`.

    ONNX Runtime's `Sigmoid` on the CPU is off by 2e-4 of its value at -8, and by 7 % at -14. Where scores are set
    against each other, as the weights of the two best experts are, that is off by as much in the result.
    """
    value, result = node.args[0], node.meta.get("val")
    wide = isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.float64)
    if not wide or not isinstance(value, fx.Node) or not _is_chosen_by(node):
        return
    with node.graph.inserting_before(node):
        for operator, others in (
            (_aten.neg.default, ()),
            (_aten.exp.default, ()),
            (_aten.add.Scalar, (1.0,)),
        ):
            value = node.graph.call_function(operator, (value, *others))
            value.meta = dict(node.meta)
    node.target, node.args = _aten.reciprocal.default, (value,)


def _is_chosen_by(node: fx.Node) -> bool:
    """Whether the largest of some scores are taken, these being the scores."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user.target in _CHOOSES:
                return True
            if user.target in _KEEPS_SCORES and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


_PLAIN_NAMES: dict[object, Any] = {
    getattr(getattr(_aten, f"__{name}__"), kind): getattr(getattr(_aten, f"bitwise_{name}"), kind)
    for name in ("and", "or", "xor")
    for kind in ("Tensor", "Scalar")
}

_RULES: dict[object, Callable[[fx.Node], None]] = {
    **dict.fromkeys(
        (
            _aten.where.self,
            _aten.where.ScalarOther,
            _aten.where.ScalarSelf,
            _aten.where.Scalar,
            _aten.masked_fill.Scalar,
            _aten.masked_fill.Tensor,
        ),
        _choose_booleans,
    ),
    **NUMBER_RULES,
    **LOG_RULES,
    **MATRIX_RULES,
    **ORDER_RULES,
    **WINDOW_RULES,
    _aten.scaled_dot_product_attention.default: _attention,
    _aten.sigmoid.default: _exact_scores,
    _aten.amax.default: _all_axes,
    _aten.amin.default: _all_axes,
    _aten.sort.stable: _stable_sort,
    _aten.argsort.stable: _stable_sort,
    **dict.fromkeys(_REDUCTIONS, _kept_narrow),
    **dict.fromkeys(_PLAIN_NAMES, _without_underscores),
    _aten.diff.default: _difference,
    _aten.repeat_interleave.self_int: _repeated_by_size,
    _aten.squeeze.dim: _squeeze,
    _aten.squeeze.dims: _squeeze,
    _aten.masked_select.default: _masked_select,
    _aten.scatter_reduce.two: _scattered_mean,
    _aten.index.Tensor: _wide_indices,
    _aten.index_put.default: _put,
    _aten.slice.Tensor: carry_constants,
}
